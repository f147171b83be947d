"""Reduce: the checkpoint as other libraries read it, and what makes a stitch refuse its units."""

import hashlib
import json
import uuid
from dataclasses import replace

import pytest
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from p48ray.errors import CorruptObjectError
from p48ray.run import run_root
from p48ray.run.checked import load_unit_manifests
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import ShardVerdict, UnitManifest
from p48ray.stages.final_files import finish_checkpoint
from p48ray.stages.reduce import stitch_shard
from p48ray.store import MemoryStore
from p48ray.store.base import ObjectInfo
from p48ray.unit.context import StageContext
from tests.conftest import TINY
from tests.reference import whole_model
from tests.stages.damage import INDEX, Folder, raw
from tests.stages.damages import EXPERT, SUFFIXES
from tests.stages.small_run import NOT_CARRIED, SIDECARS, SmallRun

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


def units_of(run: SmallRun) -> list[UnitManifest]:
    return load_unit_manifests(run.prepared.plan, run.prepared.store)


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
        units_only,
        finished.prepared.shards,
        verdicts_of(finished),
        units_of(finished),
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
        units_only,
        finished.prepared.shards,
        verdicts_of(finished),
        units_of(finished),
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
    other = UnitManifest.load(units_only.store, key).model_copy(update={"units_digest": "0" * 64})
    units_only.store.put(key, other.to_json())
    with pytest.raises(
        CorruptObjectError, match=rf"{key}: units_digest: expected .*, found '000000000000"
    ):
        stitch_shard(units_only, finished.prepared.shards[0])


# Verification: a clean folder
