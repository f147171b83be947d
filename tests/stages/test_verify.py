"""Verify: a clean checkpoint has no problems; every damage is named, with the source or without."""

import json
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p48ray.checkpoint.header import TensorEntry
from p48ray.config.load import load_config
from p48ray.errors import P48Error, ShardCorruptError
from p48ray.finished.verifier import verify_folder
from p48ray.finished.verify_checkpoint import CheckpointVerdict
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import ShardVerdict
from p48ray.stages.prepare import prepare
from p48ray.stages.shard_proof import compare_rows
from p48ray.stages.verify import check_folder, verify_and_record
from p48ray.store import LocalStore, MemoryStore
from tests.checkpoint.tiny_variants import flat_names, load_tiny, plain_experts, write_folder
from tests.conftest import REPO, TINY
from tests.reference import whole_model
from tests.stages.damage import INDEX, Folder, raw
from tests.stages.damages import DAMAGES, GATE, LAYER_1, SUFFIXES
from tests.stages.slow_nvfp4 import decode_weights
from tests.stages.small_run import SETTINGS, SmallRun, run_locally
from tests.stages.test_reduce import verdicts_of


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
    return problems + check_folder(context, run.prepared.shards)


def verdict_of(run: SmallRun, folder: Folder, with_source: bool) -> CheckpointVerdict:
    return verify_folder(folder.store(), LocalStore(run.source) if with_source else None)


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
        assert verify_folder(folder.store(), source).problems == ()


# Verification: damage


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
            problems = verify_folder(folder.store(), None).problems
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
    verdict = verify_folder(clean.store(), LocalStore(finished.root / "checkpoint"))
    assert is_named(
        verdict.problems,
        ("not the source of this checkpoint", finished.prepared.source.fingerprint[:12]),
    )


def test_manifest_of_the_checkpoint_that_is_damaged_is_named(clean: Folder) -> None:
    with pytest.raises(
        ShardCorruptError, match=r"p48ray\.json: not a CheckpointManifest: scale_span"
    ):
        verify_folder(clean.with_json("p48ray.json", lambda m: m.pop("scale_span")).store(), None)


def test_verification_reads_and_changes_nothing(finished: SmallRun, clean: Folder) -> None:
    store = clean.store()
    verify_folder(store, LocalStore(finished.source))
    assert {info.key: store.get(info.key) for info in store.list()} == clean.files


def test_findings_have_an_order_of_their_own(finished: SmallRun) -> None:
    """A set's order changes from process to process, and verdicts are compared."""
    shard = finished.prepared.shards[0]
    rows = [(f"{n:02}", "U8", (2,)) for n in range(20)]
    found = {
        name: TensorEntry(name=name, file=shard.name, dtype="U8", shape=(3,), start=0, num_bytes=3)
        for name, _, _ in reversed(rows)
    }
    problems = list(compare_rows(shard, rows, found))
    assert len(problems) == 20 and problems == sorted(problems)
