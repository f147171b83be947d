"""A checkpoint of others, paired-4:8 sparse, in dense storage: the same weights but for what is
said, held by a p48ray.json like any other, and nothing half-written."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from p48ray.errors import ConfigError, P48Error, SourceError
from p48ray.finished.convert import begin_conversion
from p48ray.finished.converter import convert_folder
from p48ray.finished.foreign import (
    ConvertedShard,
    convert_foreign_shard,
    survey_foreign_conversion,
)
from p48ray.finished.release import read_release
from p48ray.finished.verifier import verify_folder
from p48ray.report.foreign_card import LISTED_LINEARS
from p48ray.report.inspect import inspect_linear
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.store import LocalStore, MemoryStore
from tests.reference.foreign import PROJECTIONS, dense_weight, foreign_checkpoint, sparse_weight
from tests.reference.modelopt import read_all
from tests.stages.damage import INDEX, Folder
from tests.stages.small_run import SmallRun

EXPERT = "language_model.model.layers.1.mlp.experts.3"
UP = f"{EXPERT}.up_proj"


def contents(store: MemoryStore) -> Folder:
    return Folder({info.key: store.get(info.key) for info in store.list()})


def converted(folder: Folder, to: str = "dense") -> Folder:
    target = Folder({}).store()
    convert_folder(folder.store(), target, to, None)  # type: ignore[arg-type]
    return contents(target)


def manifest_of(folder: Folder) -> CheckpointManifest:
    return CheckpointManifest.from_json(folder.files[MANIFEST_FILE], MANIFEST_FILE)


@pytest.fixture(scope="module")
def own(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


@pytest.fixture(scope="module")
def foreign(own: Folder) -> Folder:
    return Folder(foreign_checkpoint(own.files))


@pytest.fixture(scope="module")
def dense(foreign: Folder) -> Folder:
    return converted(foreign)


def linears_of(folder: Folder) -> list[str]:
    return sorted(manifest_of(folder).relative_weight_errors)


def test_every_weight_is_theirs_but_for_rounded_scales(foreign: Folder, dense: Folder) -> None:
    before, after, manifest = read_all(foreign.files), read_all(dense.files), manifest_of(dense)
    assert manifest.foreign is not None and len(linears_of(dense)) == 192
    changed = set()
    for linear in linears_of(dense):
        theirs, ours = sparse_weight(before, linear), dense_weight(after, linear)
        error = float(((theirs - ours) ** 2).sum() / (theirs**2).sum())
        assert manifest.relative_weight_errors[linear] == pytest.approx(error, rel=1e-4, abs=1e-12)
        if linear not in manifest.foreign.foldings:
            assert np.array_equal(theirs, ours), linear
            continue
        changed.add(linear)
        folding = manifest.foreign.foldings[linear]
        is_set = theirs != 0
        rounding = np.abs(ours[is_set] / theirs[is_set] - 1)
        assert rounding.max() == pytest.approx(folding.largest_rounding, rel=1e-9)
        spans = (np.abs(ours - theirs).reshape(len(theirs), -1, 32).max(-1) > 1e-12).sum()
        assert 0 < folding.num_rounded == spans <= folding.num_groups
    # of each expert one of gate and up gave way, now this and now that
    assert len(changed) == 64 and {name.rpartition(".")[2] for name in changed} == {
        "gate_proj",
        "up_proj",
    }


def test_powers_of_two_lose_nothing(own: Folder) -> None:
    theirs = Folder(foreign_checkpoint(own.files, by_powers_of_two=True))
    ours = converted(theirs)
    before, after = read_all(theirs.files), read_all(ours.files)
    foldings = manifest_of(ours).foreign.foldings  # type: ignore[union-attr]
    assert foldings and {f.num_rounded for f in foldings.values()} == {0}
    for linear in linears_of(ours):
        assert np.array_equal(sparse_weight(before, linear), dense_weight(after, linear))
    card = ours.files["README.md"].decode()
    assert "64 of 64 experts are exactly what they were" in card and "largest rounding" not in card


def test_gate_and_up_share_and_scalars_have_one_element(dense: Folder) -> None:
    after = read_all(dense.files)
    for linear in linears_of(dense):
        gate = f"{linear.rpartition('.')[0]}.gate_proj"
        for suffix in ("weight_global_scale", "input_global_scale"):
            assert after[f"{linear}.{suffix}"][:2] == ("F32", [1])
            if linear.endswith("up_proj"):
                assert after[f"{linear}.{suffix}"] == after[f"{gate}.{suffix}"]
        assert np.frombuffer(after[f"{linear}.input_global_scale"][2], np.float32) == 1


def test_all_else_is_carried_over(own: Folder, foreign: Folder, dense: Folder) -> None:
    before, after = read_all(foreign.files), read_all(dense.files)
    linears = set(linears_of(dense))
    others = {n for n in before if n.rpartition(".")[0] not in linears}
    assert len(others) > 20 and {n: after[n] for n in others} == {n: before[n] for n in others}
    assert dense.json("config.json") == own.json("config.json")
    assert "LICENSE" in dense.files and "chat_template.jinja" in dense.files
    assert {n for n in dense.files if n.endswith(".json")} == {
        n for n in own.files if n.endswith(".json")
    }
    index = dense.json(INDEX)
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in after.values())


def test_either_of_their_storages_gives_the_same_bytes(own: Folder, dense: Folder) -> None:
    other = converted(Folder(foreign_checkpoint(own.files, is_sparse=False)))
    assert other.shards == dense.shards
    assert [f for f in dense.shards if other.files[f] != dense.files[f]] == []


def test_result_is_verified_alone_and_beside_what_it_came_from(
    foreign: Folder, dense: Folder
) -> None:
    theirs = foreign.store()
    for source in (None, theirs):
        verdict = verify_folder(dense.store(), source)
        assert (verdict.problems, verdict.num_linears) == ((), 192)
    flipped = dense.flipped(f"{UP}.weight_packed", 9, 0x10)
    for source in (None, theirs):
        found = "\n".join(verify_folder(flipped.store(), source).problems)
        assert "unit L001-E000-007: expected the bytes with SHA-256" in found
    other = foreign.flipped("lm_head.weight" if "lm_head.weight" in read_all(foreign.files) else (
        "language_model.lm_head.weight"), 0, 1)  # fmt: skip
    found = "\n".join(verify_folder(dense.store(), other.store()).problems)
    assert "not the source of this checkpoint" in found


def test_result_converts_on_and_back(dense: Folder) -> None:
    for form in ("sparse", "modelopt"):
        there = converted(dense, form)
        assert verify_folder(there.store(), None).problems == ()
        assert converted(there).changed_from(dense) == []


def test_result_can_be_published(dense: Folder) -> None:
    release = read_release(dense.store(), None)
    assert release.manifest.origin.startswith("converted from ")
    assert sorted(release.names) == sorted(dense.files)


def test_card_says_what_was_rounded(foreign: Folder, dense: Folder) -> None:
    card, manifest = dense.files["README.md"].decode(), manifest_of(dense)
    assert card.startswith(foreign.files["README.md"].decode().rstrip())
    assert manifest.foreign is not None
    worst = max(manifest.foreign.foldings.items(), key=lambda pair: pair[1].largest_rounding)
    assert f"by {worst[1].largest_rounding:.4%} at most (`{worst[0]}`)" in card
    assert card.count("\n| `language_model") == LISTED_LINEARS
    assert f"The other {64 - LISTED_LINEARS} are in `p48ray.json`" in card
    # put before what says how it is served
    with_serving = foreign.with_file("README.md", b"# A\n\n## Serving\n\nSo.\n")
    text = converted(with_serving).files["README.md"].decode()
    assert text.index("# A") < text.index("## Conversion") < text.index("## Serving")
    bare = converted(foreign.without_file("README.md")).files["README.md"].decode()
    assert bare.startswith("## Conversion to dense storage")


def test_inspect_reads_both_and_says_what_was_rounded(foreign: Folder, dense: Folder) -> None:
    gave_way = next(iter(manifest_of(dense).foreign.foldings))  # type: ignore[union-attr]
    theirs = inspect_linear(foreign.store(), gave_way, None)
    ours = inspect_linear(dense.store(), gave_way, foreign.store())
    assert (theirs.codes, theirs.patterns, theirs.shape) == (ours.codes, ours.patterns, ours.shape)
    assert theirs.illegal_groups == 0 and "-0" not in theirs.codes
    assert theirs.folding is None and ours.folding is not None and ours.folding.num_rounded
    assert ours.weight_global_scale < theirs.weight_global_scale
    claim = manifest_of(dense).relative_weight_errors[gave_way]
    assert ours.relative_weight_error == pytest.approx(claim, rel=1e-4)


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p48ray.finished.foreign.MAX_SHARD_SIZE", 2_000_000)


def test_interrupted_conversion_goes_on(foreign: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    expected, source, target = converted(foreign), foreign.store(), Folder({}).store()
    survey = survey_foreign_conversion(source, target, "dense")
    assert len(survey.shards) > 3 and not survey.is_done
    begin_conversion(target, survey.note)
    convert_foreign_shard(pickle.loads(pickle.dumps(survey.shards[0])))  # as a worker gets it
    convert_foreign_shard(survey.shards[1])
    target.delete(survey.shards[1].record)  # killed between the two
    with pytest.raises(ConfigError, match="expected a finished checkpoint, found no"):
        read_release(target, None)
    convert_folder(source, target, "dense", None)
    assert contents(target).changed_from(expected) == []
    assert [n for n in expected.files if n.startswith("p48ray-convert")] == []


def test_file_that_is_done_is_not_made_again(
    foreign: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    source, target = foreign.store(), Folder({}).store()
    survey = survey_foreign_conversion(source, target, "dense")
    begin_conversion(target, survey.note)
    for shard in survey.shards[:2]:
        convert_foreign_shard(shard)
    made: list[str] = []
    monkeypatch.setattr(
        "p48ray.finished.converter.convert_foreign_shard",
        lambda shard: made.append(shard.file) or convert_foreign_shard(shard),
    )
    convert_folder(source, target, "dense", None)
    assert made == [shard.file for shard in survey.shards[2:]]


def test_same_call_again_finds_it(foreign: Folder) -> None:
    source, target = foreign.store(), Folder({}).store()
    first = convert_folder(source, target, "dense", None)
    written = target.traffic.bytes_written
    again = convert_folder(source, target, "dense", None)
    assert again.was_there and not first.was_there and again.folding == first.folding
    assert target.traffic.bytes_written == written
    assert first.expert_bytes[1] / first.expert_bytes[0] > 1.5


def test_another_checkpoints_target_is_left_alone(foreign: Folder, own: Folder) -> None:
    target = Folder({}).store()
    survey = survey_foreign_conversion(foreign.store(), target, "dense")
    begin_conversion(target, survey.note)
    other = Folder(foreign_checkpoint(own.files, by_powers_of_two=True)).store()
    with pytest.raises(ConfigError, match="found an unfinished conversion to dense storage"):
        convert_folder(other, target, "dense", None)
    done = Folder({}).store()
    convert_folder(foreign.store(), done, "dense", None)
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        convert_folder(other, done, "dense", None)


@pytest.mark.parametrize("to", ["sparse", "modelopt"])
def test_other_forms_are_made_of_the_dense_one(foreign: Folder, to: str) -> None:
    with pytest.raises(ConfigError, match=r"expected --storage dense .*found (sparse|ModelOpt)"):
        converted(foreign, to)


def config_with(folder: Folder, **changes: object) -> Folder:
    config = folder.json("config.json")
    config["quantization_config"] |= changes
    return folder.with_file("config.json", json.dumps(config).encode())


def without_tensor(folder: Folder, name: str) -> Folder:
    file = folder.file_of(name)
    tensors = {n: t for n, t in folder.tensors(file).items() if n != name}
    index = folder.json(INDEX)
    del index["weight_map"][name]
    return folder.with_tensors(file, tensors).with_file(INDEX, json.dumps(index).encode())


def cut_short(folder: Folder) -> Folder:
    file = folder.file_of(f"{UP}.weight_scale")
    return folder.with_file(file, folder.files[file][:-1000])


BAD: list[tuple[Callable[[Folder], Folder], str]] = [
    (cut_short, r"model-00003-of-00006.safetensors: .*truncated; download it again"),
    (
        lambda f: f.without_file(f.file_of(f"{UP}.weight_scale")),
        "names files that are not in .*model-00003-of-00006.safetensors; download",
    ),
    (
        lambda f: without_tensor(f, f"{UP}.weight_global_scale"),
        rf"model-00003-of-00006.*{UP}.weight_global_scale: expected .*found input_global_scale",
    ),
    (
        lambda f: without_tensor(f, f"{UP}.input_global_scale"),
        rf"{UP}.input_global_scale: expected",
    ),
    (
        lambda f: f.with_bytes(f"{UP}.weight_global_scale", 0, bytes(4)),
        rf"model-00003-of-00006.safetensors: tensor {UP}.weight_global_scale: .*found 0.0",
    ),
    (
        lambda f: f.with_bytes(f"{UP}.weight_global_scale", 0, b"\x00\x00\xc0\x7f"),
        rf"tensor {UP}.weight_global_scale: .*found nan",
    ),
    (
        lambda f: f.with_bytes(f"{UP}.weight_sparse_mask", 5, b"\x77"),
        rf"tensor {UP}.weight_sparse_mask: .*exactly 2 of 4 bits in every mask, found 0111",
    ),
    (
        lambda f: config_with(f, paired48_sparse={"layout": "tiles", "version": 1}),
        "quantization_config.paired48_sparse: expected .*pair-bitmask.*found .*tiles",
    ),
    (
        lambda f: config_with(f, paired48_sparse=None),
        r"weight_packed: expected weight_packed, .* for this linear, found .*weight_sparse_mask",
    ),
    (
        lambda f: config_with(f, format="pack-quantized"),
        "found no p48ray.json in it; nor does config.json announce paired-4:8 experts",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("action", ["convert", "verify"])
def test_bad_input_is_one_error_and_leaves_nothing(
    foreign: Folder, damage: Callable[[Folder], Folder], message: str, action: str, tmp_path: Path
) -> None:
    bad, target = damage(foreign).store(), LocalStore(tmp_path / "out")
    if action == "convert":
        with pytest.raises(P48Error, match=message) as found:
            convert_folder(bad, target, "dense", None)
        assert isinstance(found.value, SourceError | ConfigError)
        assert not any(i.key.endswith((".safetensors", INDEX)) for i in target.list())
        return
    try:
        problems = "\n".join(verify_folder(bad, None).problems)
    except P48Error as error:
        problems = str(error)
    assert re.search(message, problems), problems


def test_illegal_pattern_of_dense_storage_is_named(own: Folder) -> None:
    theirs = Folder(foreign_checkpoint(own.files, is_sparse=False))
    bad = theirs.with_bytes(f"{UP}.weight_packed", 8, b"\x11\x11\x11")
    with pytest.raises(SourceError, match=rf"{UP}.weight_packed: .*found 1 groups of 8 with more"):
        converted(bad)


def test_records_name_the_checkpoint_that_they_are_of(foreign: Folder) -> None:
    source, target = foreign.store(), Folder({}).store()
    survey = survey_foreign_conversion(source, target, "dense")
    convert_foreign_shard(survey.shards[0])
    record = ConvertedShard.load(target, survey.shards[0].record)
    assert record.source_fingerprint == survey.source.fingerprint
    assert set(record.unit_sha256) and set(record.relative_weight_errors) == {
        f"language_model.model.layers.{layer}.mlp.experts.{e}.{p}"
        for layer in range(1, 5)
        for e in range(16)
        for p in PROJECTIONS
    }
