"""The finished folder as the Hub's libraries see it, and every way of damaging it that verification
must notice."""

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from p48ray.config.load import load_config
from p48ray.errors import CorruptObjectError, P48Error, ShardCorruptError
from p48ray.finished.verify_checkpoint import CheckpointVerdict, verify_checkpoint
from p48ray.run import run_root
from p48ray.run.manifest import CheckpointManifest, ShardVerdict, UnitManifest
from p48ray.runner.pipeline import read_units
from p48ray.stages.final_files import finish_checkpoint
from p48ray.stages.index_proof import check_index
from p48ray.stages.prepare import prepare
from p48ray.stages.reduce import stitch_shard
from p48ray.stages.verify import verify_and_record
from p48ray.store import LocalStore, MemoryStore
from p48ray.store.base import ObjectInfo
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext
from tests.checkpoint.tiny_variants import flat_names, load_tiny, plain_experts, write_folder
from tests.conftest import REPO, TINY
from tests.reference import whole_model
from tests.stages.damage import INDEX, Folder
from tests.stages.slow_nvfp4 import decode_weights
from tests.stages.small_run import NOT_CARRIED, SETTINGS, SIDECARS, SmallRun, run_locally

EXPERT = re.compile(r".*layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.\w+")
LAYER_1 = "language_model.model.layers.1.mlp.experts"
GATE, UP, DOWN = (f"{LAYER_1}.3.{p}" for p in ("gate_proj", "up_proj", "down_proj"))
UNTOUCHED = "language_model.model.layers.2.self_attn.o_proj.weight"
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


@pytest.fixture(scope="module")
def clean(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# The folder


def test_safetensors_opens_every_shard_and_the_index_places_every_tensor(
    finished: SmallRun, clean: Folder
) -> None:
    placed, total = {}, 0
    for file in clean.shards:
        with safe_open(finished.checkpoint / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                assert name not in placed
                placed[name] = file
                total += len(raw(opened.get_tensor(name)))
    index = clean.json(INDEX)
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == total


def test_shards_are_named_in_order_and_stay_under_the_size_asked_for(
    finished: SmallRun, clean: Folder
) -> None:
    count = len(clean.shards)
    assert count > 3
    assert clean.shards == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    sizes = [sum(len(raw(t)) for t in clean.tensors(file).values()) for file in clean.shards]
    assert max(sizes) <= 2_000_000
    assert sum(sizes) > 2_000_000 * (count - 2), "shards are filled"


def test_tensors_are_the_untouched_ones_and_four_per_expert_linear(clean: Folder) -> None:
    source = whole_model.read_all(TINY)
    untouched = {name for name in source if not EXPERT.fullmatch(name)}
    linears = {name.rpartition(".")[0] for name in source if EXPERT.fullmatch(name)}
    assert len(linears) == 4 * 16 * 3
    assert set(clean.json(INDEX)["weight_map"]) == untouched | {
        f"{linear}.{suffix}" for linear in linears for suffix in SUFFIXES
    }


def test_untouched_tensors_are_the_sources_bytes(clean: Folder) -> None:
    source = whole_model.read_all(TINY)
    compared = 0
    for file in clean.shards:
        for name, tensor in clean.tensors(file).items():
            if not EXPERT.fullmatch(name):
                assert (tensor.dtype, tensor.shape, raw(tensor)) == (
                    source[name].dtype,
                    source[name].shape,
                    raw(source[name]),
                ), name
                compared += 1
    assert compared > 60


def test_expert_tensors_are_the_units_bytes(finished: SmallRun, clean: Folder) -> None:
    for unit in finished.prepared.plan.units:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        with safe_open(
            finished.root / run_root.unit_shard(unit.id, manifest.attempt), "pt"
        ) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                file, start, size = clean.place(name)
                assert clean.files[file][start : start + size] == raw(opened.get_tensor(name)), name


def test_config_is_the_sources_without_int4_and_with_nvfp4_at_the_top(clean: Folder) -> None:
    config = clean.json("config.json")
    assert "pack-quantized" not in json.dumps(config).replace("nvfp4-pack-quantized", "")
    quantization = config.pop("quantization_config")
    assert "quantization_config" not in json.dumps(config)
    source = json.loads((TINY / "config.json").read_text())
    del source["text_config"]["quantization_config"]
    assert config == source
    assert (quantization["quant_method"], quantization["format"]) == (
        "compressed-tensors",
        "nvfp4-pack-quantized",
    )
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"]
    for key, dynamic in (("weights", False), ("input_activations", "local")):
        args = group[key]
        found = tuple(
            args[name]
            for name in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")
        )
        assert found == (4, "float", "tensor_group", 16, True, dynamic)


def test_compressed_tensors_reads_the_quantization_config(clean: Folder) -> None:
    config = QuantizationConfig.model_validate(clean.json("config.json")["quantization_config"])
    assert config.format == "nvfp4-pack-quantized"
    assert config.quantization_status.value == "compressed"
    assert len(config.config_groups) == 1


def test_transformers_loads_config_and_tokenizer_of_the_folder(finished: SmallRun) -> None:
    config = AutoConfig.from_pretrained(finished.checkpoint)
    assert config.model_type == "kimi_k25"
    assert config.text_config.n_routed_experts == 16
    assert config.quantization_config["format"] == "nvfp4-pack-quantized"
    assert not hasattr(config.text_config, "quantization_config")
    tokenizer, source = (
        AutoTokenizer.from_pretrained(f, local_files_only=True)
        for f in (finished.checkpoint, finished.source)
    )
    assert tokenizer("def f(x): return x")["input_ids"] == source("def f(x): return x")["input_ids"]


def test_files_that_serve_the_model_are_carried_over_and_texts_are_not(
    finished: SmallRun, clean: Folder
) -> None:
    carried = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        *SIDECARS,
    }
    for name in carried:
        assert clean.files[name] == (finished.source / name).read_bytes(), name
    assert set(clean.files) == carried | set(clean.shards) | {
        "config.json",
        "README.md",
        "p48ray.json",
        INDEX,
    }
    assert not set(clean.files) & (
        {"calibration.jsonl", "heldout.jsonl", "TRAINING.md"} | set(NOT_CARRIED) - {"README.md"}
    )
    assert clean.files["README.md"] != NOT_CARRIED["README.md"]


def test_checkpoints_own_manifest_claims_what_the_units_manifests_claim(
    finished: SmallRun, clean: Folder
) -> None:
    found = CheckpointManifest.from_json(clean.files["p48ray.json"], "p48ray.json")
    units = [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]
    assert found.relative_weight_errors == {
        r.name: r.relative_weight_error for u in units for r in u.linears
    }
    assert len(found.relative_weight_errors) == 192
    assert (found.sparsity, found.scale_span, found.activation_group) == ("paired-4:8", 32, 16)
    assert (found.plan_digest, found.source_fingerprint) == (
        finished.prepared.plan.digest,
        finished.prepared.source.fingerprint,
    )


# Stitching again, and from units that are not what their manifests say


@pytest.fixture
def units_only(finished: SmallRun) -> StageContext:
    """A run in memory that holds the finished run's units and nothing else."""
    store = MemoryStore(uuid.uuid4().hex)
    for info in finished.prepared.store.list("units/"):
        store.put(info.key, finished.prepared.store.get(info.key))
    return replace(finished.context, store=store)


def verdicts_of(run: SmallRun) -> list[ShardVerdict]:
    return [
        ShardVerdict.load(run.prepared.store, run_root.shard_verdict(s.name))
        for s in run.prepared.shards
    ]


def test_reduce_makes_the_same_folder_from_the_same_units(
    finished: SmallRun, units_only: StageContext, clean: Folder
) -> None:
    for shard in reversed(finished.prepared.shards):
        assert stitch_shard(units_only, shard).size_bytes == len(clean.files[shard.name])
    finish_checkpoint(
        units_only, finished.prepared.shards, verdicts_of(finished), read_units(finished.prepared)
    )
    made = {
        info.key.removeprefix("checkpoint/"): units_only.store.get(info.key)
        for info in units_only.store.list("checkpoint/")
    }
    # the card comes with the report
    assert made == {name: data for name, data in clean.files.items() if name != "README.md"}


def test_index_is_written_after_everything_else(
    finished: SmallRun, units_only: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put, compose = MemoryStore.put, MemoryStore.compose
    monkeypatch.setattr(
        MemoryStore, "put", lambda self, key, data: written.append(key) or put(self, key, data)
    )
    monkeypatch.setattr(
        MemoryStore,
        "compose",
        lambda self, key, pieces: written.append(key) or compose(self, key, pieces),
    )
    finish_checkpoint(
        units_only, finished.prepared.shards, verdicts_of(finished), read_units(finished.prepared)
    )
    assert written[-1] == f"checkpoint/{INDEX}"
    assert {"checkpoint/config.json", "checkpoint/p48ray.json", "checkpoint/tokenizer.json"} <= set(
        written
    )


def test_finished_shard_is_not_composed_again(
    finished: SmallRun, units_only: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stitch_shard(units_only, finished.prepared.shards[0])

    def refuse(*_: object) -> None:
        raise AssertionError("nothing should be composed")

    monkeypatch.setattr(MemoryStore, "compose", refuse)
    assert stitch_shard(units_only, finished.prepared.shards[0]) == first
    with pytest.raises(AssertionError, match="nothing should be composed"):
        stitch_shard(units_only, finished.prepared.shards[1])


@pytest.mark.parametrize("damage", ["shorter", "longer", "absent", "one bit"])
def test_unit_of_other_bytes_than_its_manifest_says_is_refused_by_name(
    finished: SmallRun, units_only: StageContext, damage: str
) -> None:
    unit = finished.prepared.plan.units[0]
    key = run_root.unit_shard(
        unit.id, UnitManifest.load(units_only.store, run_root.unit_manifest(unit.id)).attempt
    )
    data = units_only.store.get(key)
    other = {
        "shorter": data[:-1],
        "longer": data + b"\0",
        "absent": None,
        "one bit": data[:-1] + bytes([data[-1] ^ 1]),
    }[damage]
    units_only.store.delete(key)
    found = "nothing"
    if other is not None:
        units_only.store.put(key, other)
        digest = (
            f" with SHA-256 {hashlib.sha256(other).hexdigest()[:12]}"
            if len(other) == len(data)
            else ""
        )
        found = f"{len(other)} bytes{digest}"
    manifest = run_root.unit_manifest(unit.id)
    expected = f"{len(data)} bytes with SHA-256 {hashlib.sha256(data).hexdigest()[:12]}"
    with pytest.raises(
        CorruptObjectError, match=rf"{key}: expected {expected} as {manifest} says, found {found}$"
    ) as caught:
        stitch_shard(units_only, finished.prepared.shards[0])
    assert caught.value.keys == (manifest, key)
    assert list(units_only.store.list("checkpoint/")) == []


class KeptDigest(MemoryStore):
    """A store that keeps a digest beside every object, as S3 does; it says the same of all."""

    def head(self, key: str) -> ObjectInfo | None:
        held = super().head(key)
        return held and replace(held, sha256=DIGEST)


DIGEST = "5" * 64


def test_digest_that_the_store_keeps_is_taken_for_the_units(
    finished: SmallRun, units_only: StageContext
) -> None:
    keeping = replace(units_only, store=KeptDigest(units_only.store.name))
    with pytest.raises(CorruptObjectError, match=f"found [0-9]+ bytes with SHA-256 {DIGEST[:12]}$"):
        stitch_shard(keeping, finished.prepared.shards[0])
    for unit in finished.prepared.plan.units:
        key = run_root.unit_manifest(unit.id)
        units_only.store.put(
            key,
            UnitManifest.load(units_only.store, key)
            .model_copy(update={"sha256": DIGEST})
            .to_json(),
        )
    assert stitch_shard(keeping, finished.prepared.shards[0]).size_bytes > 0


def test_unit_of_another_plan_is_refused_by_name(
    finished: SmallRun, units_only: StageContext
) -> None:
    key = run_root.unit_manifest(finished.prepared.plan.units[0].id)
    other = UnitManifest.load(units_only.store, key).model_copy(update={"plan_digest": "0" * 64})
    units_only.store.put(key, other.to_json())
    with pytest.raises(
        ShardCorruptError, match=rf"{key}: expected plan digest .*, found 000000000000"
    ):
        stitch_shard(units_only, finished.prepared.shards[0])


# Verification: a clean folder


def problems_by_the_job(
    run: SmallRun, folder: Folder, files: Iterable[str] | None = None
) -> list[str]:
    """As the job verifies: shard by shard against source and unit manifests, then the index.
    `files`: shards to look at, None for all."""
    store = MemoryStore(uuid.uuid4().hex)
    for name, data in folder.files.items():
        store.put(run_root.checkpoint_file(name), data)
    for unit in run.prepared.plan.units:
        key = run_root.unit_manifest(unit.id)
        store.put(key, run.prepared.store.get(key))
    context, problems = replace(run.context, store=store), []
    chosen = {shard.name for shard in run.prepared.shards} if files is None else set(files)
    for shard in run.prepared.shards:
        if shard.name in chosen:
            verify_and_record(context, shard)
            problems += ShardVerdict.load(store, run_root.shard_verdict(shard.name)).problems
    return problems + check_index(
        SubStore(store, run_root.CHECKPOINT), run.prepared.shards, run.context.layout
    )


def verdict_of(run: SmallRun, folder: Folder, with_source: bool) -> CheckpointVerdict:
    return verify_checkpoint(folder.store(), LocalStore(run.source) if with_source else None)


def test_clean_folder_has_no_problems(finished: SmallRun, clean: Folder) -> None:
    assert problems_by_the_job(finished, clean) == []
    for with_source in (True, False):
        verdict = verdict_of(finished, clean, with_source)
        assert (verdict.problems, verdict.compared_with_source) == ((), with_source)
        assert (verdict.num_shards, verdict.num_linears) == (len(clean.shards), 192)


def test_verdicts_of_the_job_count_what_they_looked_at(finished: SmallRun, clean: Folder) -> None:
    verdicts = verdicts_of(finished)
    assert [v.num_tensors for v in verdicts] == [len(clean.tensors(file)) for file in clean.shards]
    assert [v.size_bytes for v in verdicts] == [len(clean.files[file]) for file in clean.shards]
    assert sum(v.num_linears for v in verdicts) == 192


@pytest.mark.slow
def test_dense_checkpoint_of_a_flat_bf16_source_is_whole_and_not_held_to_patterns(
    tmp_path: Path,
) -> None:
    """The other end of what is allowed: `model.` names, plain experts, no sparsity, a scale per 16,
    one shard."""
    config = json.loads((TINY / "config.json").read_text())["text_config"]
    del config["quantization_config"]
    tensors = load_tiny()
    write_folder(
        tmp_path / "source",
        config | {"model_type": "deepseek_v3"},
        flat_names(plain_experts(tensors)),
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, tmp_path / "source" / name)
    overrides = (
        *SETTINGS,
        "calibration.num_sequences=2",
        "compression.solver=round_to_nearest",
        "compression.sparsity=none",
        "compression.scale_span=16",
        "output.max_shard_size=1GB",
        "evaluation=null",
        f"source.checkpoint={tmp_path / 'source'}",
    )
    run_locally(
        prepare(load_config(REPO / "configs" / "tiny.yaml", overrides, str(tmp_path / "run")))
    )
    folder = Folder.read(tmp_path / "run" / "checkpoint")
    assert folder.shards == ["model-00001-of-00001.safetensors"]
    found = folder.tensors(folder.shards[0])
    stem = "model.layers.3.mlp.experts.9.up_proj"
    assert (found[f"{stem}.weight_packed"].unflatten(1, (-1, 4)) != 0).sum(-1).max() == 4
    original = whole_model.decode_int4(tensors, f"language_model.{stem}").double()
    stored = decode_weights({suffix: found[f"{stem}.{suffix}"] for suffix in SUFFIXES})
    assert (original - stored).square().sum() / original.square().sum() < 0.02
    assert raw(found["model.norm.weight"]) == raw(tensors["language_model.model.norm.weight"])
    for source in (LocalStore(tmp_path / "source"), None):
        assert verify_checkpoint(folder.store(), source).problems == ()


# Verification: damage


def first(condition: Tensor) -> tuple[int, ...]:
    """Index of the first True, by rows."""
    return tuple(torch.nonzero(condition)[0].tolist())


def packed(folder: Folder, linear: str) -> Tensor:
    return folder.tensors(folder.file_of(f"{linear}.weight_packed"))[f"{linear}.weight_packed"]


def with_illegal_pattern(folder: Folder) -> Folder:
    """A third byte in a group of four that has two."""
    bytes_OB = packed(folder, DOWN)
    is_full = ((bytes_OB.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).repeat_interleave(4, 1)
    row, column = first(is_full & (bytes_OB == 0))
    return folder.with_bytes(f"{DOWN}.weight_packed", row * bytes_OB.shape[1] + column, b"\x10")


def with_minus_zero(folder: Folder) -> Folder:
    """A kept weight that is zero becomes minus zero: the value stays, the byte tells a sparse
    converter something else."""
    bytes_OB = packed(folder, GATE)
    row, column = first(((bytes_OB & 0x0F) == 0) & (bytes_OB >= 0x10))
    return folder.flipped(f"{GATE}.weight_packed", row * bytes_OB.shape[1] + column, 0x08)


def with_scale(low: int, high: int) -> Callable[[Folder], Folder]:
    """The two scale bytes of one span of 32 inputs."""
    return lambda folder: folder.with_bytes(f"{UP}.weight_scale", 6, bytes([low, high]))


def with_global(linears: tuple[str, ...], suffix: str, value: float) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        for linear in linears:
            folder = folder.with_bytes(f"{linear}.{suffix}", 0, raw(torch.tensor([value])))
        return folder

    return damage


def reshaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        file = folder.file_of(name)
        tensors = folder.tensors(file)
        return folder.with_tensors(file, tensors | {name: change(tensors[name])})

    return damage


def without_tensor(name: str, is_unlisted: bool) -> Callable[[Folder], Folder]:
    """`is_unlisted`: the index does not name it either, and its total is right for what is
    there."""

    def damage(folder: Folder) -> Folder:
        file = folder.file_of(name)
        tensors = folder.tensors(file)
        size = len(raw(tensors.pop(name)))

        def unlist(index: dict) -> None:
            del index["weight_map"][name]
            index["metadata"]["total_size"] -= size

        result = folder.with_tensors(file, tensors)
        return result.with_json(INDEX, unlist) if is_unlisted else result

    return damage


def with_extra_tensor(name: str, is_listed: bool) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        file = folder.shards[0]

        def enlist(index: dict) -> None:
            index["weight_map"][name] = file
            index["metadata"]["total_size"] += 8

        result = folder.with_tensors(
            file, folder.tensors(file) | {name: torch.tensor([128, 256], dtype=torch.int32)}
        )
        return result.with_json(INDEX, enlist) if is_listed else result

    return damage


def with_index(change: Callable[[dict], object]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_json(INDEX, change)


def with_config(change: Callable[[dict], object]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_json("config.json", change)


def with_shard(change: Callable[[bytes], bytes]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_file(SHARD_2, change(folder.files[SHARD_2]))


def swapped_experts(folder: Folder) -> Folder:
    """Two experts' gates trade all four tensors: each is sound in itself."""
    result = folder
    for suffix in SUFFIXES:
        for mine, theirs in ((GATE, f"{LAYER_1}.4.gate_proj"), (f"{LAYER_1}.4.gate_proj", GATE)):
            file, start, size = folder.place(f"{theirs}.{suffix}")
            result = result.with_bytes(
                f"{mine}.{suffix}", 0, folder.files[file][start : start + size]
            )
    return result


def int4_config() -> dict:
    config: dict = json.loads((TINY / "config.json").read_text())["text_config"][
        "quantization_config"
    ]
    return config


SHARD_2 = "model-00002-of-00006.safetensors"
# either names the place: bytes are vouched for unit by unit
UNIT = (LAYER_1, "model-00001-of-00006.safetensors")
EXTRA_FILE = "model-00007-of-00006.safetensors"


@dataclass(frozen=True)
class Damage:
    """`names`: what the report must say, all in one problem, of a tuple any."""

    make: Callable[[Folder], Folder]
    names: tuple[str | tuple[str, ...], ...]


DAMAGES: dict[str, Damage] = {
    "byte of an untouched tensor": Damage(
        lambda f: f.flipped(UNTOUCHED, 1000, 0x01), (UNTOUCHED, "bytes differ")
    ),
    "last byte of the embedding": Damage(
        lambda f: f.flipped("language_model.model.embed_tokens.weight", 2048 * 256 * 2 - 1, 0x80),
        ("embed_tokens.weight",),
    ),
    "illegal pattern": Damage(
        with_illegal_pattern,
        (f"{DOWN}.weight_packed", "1 groups of 8 inputs keep more than 2 of 4 pairs"),
    ),
    "minus zero": Damage(with_minus_zero, (f"{GATE}.weight_packed", "code 8")),
    "scale 0": Damage(with_scale(0, 0), (f"{UP}.weight_scale", "finite and above 0")),
    "scale NaN": Damage(with_scale(0x7F, 0x7F), (f"{UP}.weight_scale", "finite and above 0")),
    "scale below 0": Damage(with_scale(0xB8, 0xB8), (f"{UP}.weight_scale", "finite and above 0")),
    "unequal scales in a span": Damage(
        with_scale(0x38, 0x39), (f"{UP}.weight_scale", "scale_span 32")
    ),
    "gate and up with other weight globals": Damage(
        with_global((UP,), "weight_global_scale", 777.0), (f"{UP}.weight_global_scale", "found 777")
    ),
    "gate and up with other input globals": Damage(
        with_global((UP,), "input_global_scale", 777.0), (f"{UP}.input_global_scale", "found 777")
    ),
    "global 0": Damage(
        with_global((GATE, UP), "weight_global_scale", 0.0),
        (f"{GATE}.weight_global_scale", "above 0", "found 0"),
    ),
    "global infinite": Damage(
        with_global((DOWN,), "weight_global_scale", math.inf),
        (f"{DOWN}.weight_global_scale", "found inf"),
    ),
    "input global NaN": Damage(
        with_global((DOWN,), "input_global_scale", math.nan),
        (f"{DOWN}.input_global_scale", "found nan"),
    ),
    "input global below 0": Damage(
        with_global((DOWN,), "input_global_scale", -5.0), (f"{DOWN}.input_global_scale", "found -5")
    ),
    "one expert's input global is not its layer's": Damage(
        with_global((GATE, UP), "input_global_scale", 300.0), (UNIT,)
    ),
    "weights under a global of twice the size": Damage(
        with_global((GATE, UP), "weight_global_scale", 9000.0), (UNIT,)
    ),
    "global without a dimension": Damage(
        reshaped(f"{DOWN}.weight_global_scale", lambda t: t[0].clone()),
        (f"{DOWN}.weight_global_scale",),
    ),
    "global of two values": Damage(
        reshaped(f"{DOWN}.weight_global_scale", lambda t: t.repeat(2)),
        (f"{DOWN}.weight_global_scale",),
    ),
    "scales as plain bytes": Damage(
        reshaped(f"{DOWN}.weight_scale", lambda t: t.view(torch.uint8)), (f"{DOWN}.weight_scale",)
    ),
    "experts swapped": Damage(swapped_experts, (UNIT,)),
    "expert tensor gone": Damage(
        without_tensor(f"{UP}.weight_scale", is_unlisted=False), (f"{UP}.weight_scale", "missing")
    ),
    "expert tensor gone, index too": Damage(
        without_tensor(f"{UP}.weight_scale", is_unlisted=True), (f"{UP}.weight_scale", "missing")
    ),
    "untouched tensor gone": Damage(without_tensor(UNTOUCHED, is_unlisted=False), (UNTOUCHED,)),
    "untouched tensor gone, index too": Damage(
        without_tensor(UNTOUCHED, is_unlisted=True), (UNTOUCHED, "missing")
    ),
    "stray expert tensor": Damage(
        with_extra_tensor(f"{GATE}.weight_shape", is_listed=True), (f"{GATE}.weight_shape",)
    ),
    "stray expert tensor, not in the index": Damage(
        with_extra_tensor(f"{GATE}.weight_shape", is_listed=False), (f"{GATE}.weight_shape",)
    ),
    "stray tensor elsewhere": Damage(
        with_extra_tensor("language_model.stray.weight", is_listed=True),
        ("language_model.stray.weight",),
    ),
    "stray tensor elsewhere, not in the index": Damage(
        with_extra_tensor("language_model.stray.weight", is_listed=False),
        ("language_model.stray.weight",),
    ),
    "extra shard": Damage(
        lambda f: f.with_tensors(EXTRA_FILE, {"more.weight": torch.zeros(4)}), (EXTRA_FILE,)
    ),
    "extra shard that is no safetensors file": Damage(
        lambda f: f.with_file(EXTRA_FILE, b"abc"), (EXTRA_FILE,)
    ),
    "shard gone": Damage(lambda f: f.without_file(SHARD_2), (SHARD_2,)),
    "shard truncated": Damage(with_shard(lambda data: data[:-10]), (SHARD_2, "truncated")),
    "shard truncated in its header": Damage(
        with_shard(lambda data: data[:100]), (SHARD_2, "truncated")
    ),
    "shard empty": Damage(with_shard(lambda data: b""), (SHARD_2, "truncated")),
    "shard with bytes behind the end": Damage(
        with_shard(lambda data: data + b"\0" * 8), (SHARD_2, "bytes that belong to no tensor")
    ),
    "header is not JSON": Damage(
        with_shard(lambda data: data[:8] + b"[" + data[9:]), (SHARD_2, "JSON")
    ),
    "header of an absurd length": Damage(
        with_shard(lambda data: data[:7] + b"\x7f" + data[8:]), (SHARD_2, "header")
    ),
    "header with another offset": Damage(
        with_shard(lambda data: data.replace(b'"data_offsets":[4,8]', b'"data_offsets":[0,4]', 1)),
        (SHARD_2, "overlap"),
    ),
    "header with another dtype": Damage(
        with_shard(lambda data: data.replace(b'"dtype":"BF16"', b'"dtype":"FP16"', 1)),
        (SHARD_2, "FP16"),
    ),
    "index places a tensor in another shard": Damage(
        with_index(
            lambda i: i["weight_map"].update({UNTOUCHED: "model-00001-of-00006.safetensors"})
        ),
        (INDEX, UNTOUCHED),
    ),
    "index lacks a tensor": Damage(
        with_index(lambda i: i["weight_map"].pop(f"{UP}.weight_packed")),
        (INDEX, f"{UP}.weight_packed"),
    ),
    "index names a tensor that is nowhere": Damage(
        with_index(lambda i: i["weight_map"].update({"no.such": SHARD_2})), (INDEX, "no.such")
    ),
    "index names a file that is not there": Damage(
        with_index(
            lambda i: i["weight_map"].update({UNTOUCHED: "model-00009-of-00006.safetensors"})
        ),
        (INDEX, "model-00009-of-00006"),
    ),
    "index leads outside": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: "../model.safetensors"})),
        (INDEX, "../model.safetensors"),
    ),
    "index leads up": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: ".."})), (INDEX, "'..'")
    ),
    "index has a number for a file": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: 5})), (INDEX, "5")
    ),
    "total_size wrong": Damage(
        with_index(lambda i: i["metadata"].update(total_size=1)), (INDEX, "total_size", "found 1")
    ),
    "total_size gone": Damage(
        with_index(lambda i: i["metadata"].clear()), (INDEX, "total_size", "found None")
    ),
    "metadata gone": Damage(
        with_index(lambda i: i.pop("metadata")), (INDEX, "total_size", "found None")
    ),
    "metadata is null": Damage(with_index(lambda i: i.update(metadata=None)), (INDEX, "metadata")),
    "weight_map is a list": Damage(
        with_index(lambda i: i.update(weight_map=[])), (INDEX, "weight_map")
    ),
    "index is not JSON": Damage(lambda f: f.with_file(INDEX, b"{"), (INDEX, "not JSON")),
    "index gone": Damage(lambda f: f.without_file(INDEX), (INDEX, "missing")),
    "INT4 config in text_config": Damage(
        with_config(lambda c: c["text_config"].update(quantization_config=int4_config())),
        ("config.json", "text_config.quantization_config"),
    ),
    "INT4 config at the top": Damage(
        with_config(lambda c: c.update(quantization_config=int4_config())),
        ("config.json", "quantization_config.format", "'pack-quantized'"),
    ),
    "no quantization config": Damage(
        with_config(lambda c: c.pop("quantization_config")), ("config.json", "quantization_config")
    ),
    "quantization config is a text": Damage(
        with_config(lambda c: c.update(quantization_config="nvfp4")),
        ("config.json", "quantization_config"),
    ),
    "config is not JSON": Damage(
        lambda f: f.with_file("config.json", b"nothing"), ("config.json", "not JSON")
    ),
    "config gone": Damage(lambda f: f.without_file("config.json"), ("config.json", "missing")),
}


def is_named(problems: Iterable[str], names: Iterable[str | tuple[str, ...]]) -> bool:
    choices = [(name,) if isinstance(name, str) else name for name in names]
    return any(
        all(any(word in problem for word in words) for words in choices) for problem in problems
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_by_name(finished: SmallRun, clean: Folder, name: str) -> None:
    damage = DAMAGES[name]
    folder = damage.make(clean)
    assert folder.files != clean.files
    by_the_job = problems_by_the_job(finished, folder, folder.changed_from(clean))
    for problems in (by_the_job, verdict_of(finished, folder, with_source=True).problems):
        assert is_named(problems, damage.names), problems


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_without_the_source(
    finished: SmallRun, clean: Folder, name: str
) -> None:
    damage = DAMAGES[name]
    verdict = verdict_of(finished, damage.make(clean), with_source=False)
    assert not verdict.compared_with_source
    assert is_named(verdict.problems, damage.names), verdict.problems


NUM_FLIPS = 40


def random_flip(clean: Folder, seed: int) -> tuple[str, Folder]:
    """One byte of one tensor of one expert linear, other bits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(upper: int) -> int:
        return int(torch.randint(upper, (), generator=generator))

    names = sorted(
        name for name in clean.json(INDEX)["weight_map"] if name.endswith(SUFFIXES[seed % 4])
    )
    tensor = names[draw(len(names))]
    return tensor, clean.flipped(tensor, draw(clean.place(tensor)[2]), 1 + draw(255))


def is_same_value(before: Folder, after: Folder, tensor: str) -> bool:
    """Whether the linear decodes to the same weights (to the bit, minus zero apart) under the same
    input scale."""
    linear = tensor.rpartition(".")[0]
    sides = [
        {s: f.tensors(f.file_of(f"{linear}.{s}"))[f"{linear}.{s}"] for s in SUFFIXES}
        for f in (before, after)
    ]
    if any(not torch.isfinite(side["weight_scale"].float()).all() for side in sides):
        return False
    is_same_input = raw(sides[0]["input_global_scale"]) == raw(sides[1]["input_global_scale"])
    return is_same_input and torch.equal(*(decode_weights(side) for side in sides))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "num_flips"),
    [("job", NUM_FLIPS), ("with source", NUM_FLIPS // 4), ("alone", NUM_FLIPS)],
)
def test_every_flipped_byte_of_an_expert_is_reported_or_changes_no_value(
    finished: SmallRun, clean: Folder, route: str, num_flips: int
) -> None:
    """Random bytes of codes, scales and both globals in turn. The whole checkpoint is looked at
    with the source, one shard of it by the job."""
    unnoticed = []
    for seed in range(num_flips):
        tensor, folder = random_flip(clean, seed)
        if route == "job":
            problems = problems_by_the_job(finished, folder, [clean.file_of(tensor)])
        else:
            problems = list(
                verdict_of(finished, folder, with_source=route == "with source").problems
            )
        expert = tensor.rpartition(".")[0].rpartition(".")[0]
        if not is_named(problems, [(expert, clean.file_of(tensor))]) and not is_same_value(
            clean, folder, tensor
        ):
            unnoticed.append((seed, tensor))
    assert unnoticed == []


NUM_MUTATIONS = 200
UNPROMISED = ("README.md",)  # people edit the card


@pytest.mark.slow
def test_every_random_corruption_of_one_byte_is_caught_without_run_root_or_source(
    clean: Folder,
) -> None:
    """Headers, codes, scales, untouched tensors, index, config, tokenizer, the manifest itself:
    most fall on tensors, some on every file."""
    generator = torch.Generator().manual_seed(7)
    names = [name for name in sorted(clean.files) if name not in UNPROMISED]
    sizes = torch.tensor([len(clean.files[name]) for name in names], dtype=torch.float64)
    chosen = torch.multinomial(
        sizes, NUM_MUTATIONS - 5 * len(names), replacement=True, generator=generator
    ).tolist()
    chosen += list(range(len(names))) * 5
    unnoticed = []
    for file in chosen:
        data = bytearray(clean.files[names[file]])
        at, bits = (int(torch.randint(n, (), generator=generator)) for n in (len(data), 255))
        data[at] ^= 1 + bits
        folder = clean.with_file(names[file], bytes(data))
        try:
            problems = verify_checkpoint(folder.store(), None).problems
        except P48Error as error:
            problems = (str(error),)
        if not problems:
            unnoticed.append((names[file], at, bits))
    assert unnoticed == []


def test_weight_error_that_is_not_what_the_manifest_claims_is_reported_with_the_source(
    finished: SmallRun, clean: Folder
) -> None:
    """Sound bytes, a false claim: only the source's weights can tell."""
    manifest = CheckpointManifest.from_json(clean.files["p48ray.json"], "p48ray.json")
    errors = manifest.relative_weight_errors | {GATE: manifest.relative_weight_errors[GATE] * 1.01}
    folder = clean.with_file(
        "p48ray.json",
        manifest.model_copy(update={"relative_weight_errors": errors}).sealed().to_json(),
    )
    assert is_named(
        verdict_of(finished, folder, with_source=True).problems,
        (GATE, "relative weight error", "the manifest claims"),
    )
    assert verdict_of(finished, folder, with_source=False).problems == ()


def test_linear_that_the_manifest_does_not_know_is_reported(
    finished: SmallRun, clean: Folder
) -> None:
    folder = clean.with_json(
        "p48ray.json",
        lambda m: [
            m["relative_weight_errors"].pop(f"{LAYER_1}.15.{p}")
            for p in ("gate_proj", "up_proj", "down_proj")
        ],
    )
    assert is_named(
        verdict_of(finished, folder, with_source=True).problems,
        (f"{LAYER_1}.15.gate_proj", "no manifest that claims one"),
    )
    assert is_named(
        verdict_of(finished, folder, with_source=False).problems,
        (f"{LAYER_1}.15.gate_proj", "the manifest does not know"),
    )


def test_another_source_is_refused_by_its_fingerprint(finished: SmallRun, clean: Folder) -> None:
    verdict = verify_checkpoint(clean.store(), LocalStore(finished.root / "checkpoint"))
    assert is_named(
        verdict.problems,
        ("not the source of this checkpoint", finished.prepared.source.fingerprint[:12]),
    )


def test_manifest_of_the_checkpoint_that_is_damaged_is_named(clean: Folder) -> None:
    with pytest.raises(
        ShardCorruptError, match=r"p48ray\.json: not a CheckpointManifest: scale_span"
    ):
        verify_checkpoint(
            clean.with_json("p48ray.json", lambda m: m.pop("scale_span")).store(), None
        )


def test_verification_reads_and_changes_nothing(finished: SmallRun, clean: Folder) -> None:
    store = clean.store()
    verify_checkpoint(store, LocalStore(finished.source))
    assert {info.key: store.get(info.key) for info in store.list()} == clean.files
