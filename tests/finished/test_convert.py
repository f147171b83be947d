"""Conversion between dense and sparse storage: nothing is lost, nothing is believed, nothing is
done twice."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from p48ray.errors import ConfigError, P48Error, ShardCorruptError, SourceError
from p48ray.finished.convert import NOTE_FILE, begin_conversion, convert_shard, survey_conversion
from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.runner.ray_tasks import returning_errors
from p48ray.store import LocalStore, MemoryStore
from tests.conftest import REPO
from tests.reference.sparse_storage import dense_checkpoint, read_file
from tests.stages.damage import INDEX, Folder
from tests.stages.small_run import SmallRun

LINEAR = "language_model.model.layers.1.mlp.experts.3.up_proj"
UNTOUCHED = "vision_tower.patch_embed.proj.weight"
MANIFEST = "p48ray.json"


def contents(store: MemoryStore) -> Folder:
    return Folder({info.key: store.get(info.key) for info in store.list()})


def converted(folder: Folder, to: str) -> Folder:
    target = Folder({}).store()
    convert_folder(folder.store(), target, to, None)
    return contents(target)


@pytest.fixture
def dense(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


@pytest.fixture(scope="module")
def sparse(finished: SmallRun) -> Folder:
    return converted(Folder.read(finished.checkpoint), "sparse")


def resealed(folder: Folder, **changes: object) -> Folder:
    """With another manifest that is sound in itself, and says of config and index what they are."""
    manifest = CheckpointManifest.from_json(folder.files[MANIFEST], MANIFEST)
    files = {name: hashlib.sha256(folder.files[name]).hexdigest() for name in manifest.file_sha256}
    return folder.with_file(
        MANIFEST, manifest.model_copy(update={"file_sha256": files, **changes}).sealed().to_json()
    )


def test_every_file_comes_back_byte_for_byte(dense: Folder, sparse: Folder) -> None:
    assert converted(sparse, "dense").changed_from(dense) == []
    assert sparse.changed_from(dense) != []


def test_an_independent_reader_finds_every_dense_tensor_in_the_sparse_form(
    dense: Folder, sparse: Folder
) -> None:
    expected = {
        name: tensor
        for file in dense.shards
        for name, tensor in read_file(dense.files[file]).items()
    }
    assert dense_checkpoint(sparse.files) == expected
    assert any(name.endswith(".weight_packed") for name in expected)


def test_two_bytes_of_four_and_half_the_scales_are_stored(dense: Folder, sparse: Folder) -> None:
    before, after = (
        read_file(f.files[f.file_of(f"{LINEAR}.weight_scale")]) for f in (dense, sparse)
    )
    out, num_bytes = before[f"{LINEAR}.weight_packed"][1]
    assert after[f"{LINEAR}.weight_sparse_packed"][:2] == ("U8", [out, num_bytes // 2])
    assert after[f"{LINEAR}.weight_sparse_mask"][:2] == ("U8", [out, num_bytes // 8])
    assert after[f"{LINEAR}.weight_scale"][:2] == ("F8_E4M3", [out, num_bytes // 16])
    assert f"{LINEAR}.weight_packed" not in after
    for name in (f"{LINEAR}.weight_global_scale", f"{LINEAR}.input_global_scale"):
        assert after[name] == before[name]


def test_config_announces_the_layout_and_groups_of_32_and_nothing_else_changes(
    dense: Folder, sparse: Folder
) -> None:
    config = sparse.json("config.json")
    quantization = config["quantization_config"]
    assert quantization.pop("paired48_sparse") == {"layout": "pair-bitmask", "version": 1}
    for quantizer in ("weights", "input_activations"):
        assert quantization["config_groups"]["group_0"][quantizer]["group_size"] == 32
        quantization["config_groups"]["group_0"][quantizer]["group_size"] = 16
    assert config == dense.json("config.json")


def test_index_places_every_tensor_and_states_their_bytes(sparse: Folder) -> None:
    held = {
        name: (file, len(t[2]))
        for file in sparse.shards
        for name, t in read_file(sparse.files[file]).items()
    }
    index = sparse.json(INDEX)
    assert index["weight_map"] == {name: file for name, (file, _) in held.items()}
    assert list(index["weight_map"]) == sorted(held)
    assert index["metadata"] == {"total_size": sum(size for _, size in held.values())}


def test_tensors_stay_aligned_to_their_elements(sparse: Folder) -> None:
    for file in sparse.shards:
        for name, (dtype, _, _) in read_file(sparse.files[file]).items():
            width = {"F32": 4, "BF16": 2, "I64": 8}.get(dtype, 1)
            assert sparse.place(name)[1] % width == 0, name


def test_sizes_are_told_and_the_experts_shrink_to_their_share(dense: Folder) -> None:
    found = survey_conversion(dense.store(), Folder({}).store(), "sparse")
    before, after = found.expert_bytes
    assert 0.611 < after / before < 0.613  # 11/18 = 0.6111, and the scalars of small experts
    lengths = [sum(len(t[2]) for f in dense.shards for t in read_file(dense.files[f]).values())]
    assert found.all_bytes[0] == lengths[0]
    assert found.all_bytes[1] == lengths[0] - before + after


def test_card_says_what_is_stored_and_forgets_it_again(dense: Folder, sparse: Folder) -> None:
    card = sparse.files["README.md"].decode()
    assert "`weight_sparse_mask`" in card and card.count("## Sparse storage") == 1
    assert card.index("## Sparse storage") < card.index("## Serving")
    assert "## Sparse storage" not in dense.files["README.md"].decode()


@pytest.mark.parametrize(
    "fact",
    ["vLLM 0.30.0", "27 files", "SM100", "SM120", "SM103 (B300)", "--enable-expert-parallel"],
)
def test_card_and_page_name_the_same_server_of_sparse_storage(fact: str, sparse: Folder) -> None:
    card = sparse.files["README.md"].decode()
    note = card[card.index("## Sparse storage") : card.index("## Serving")]
    page = (REPO / "docs" / "serving-and-evaluating.md").read_text()
    about = page[page.index("## Who serves sparse storage") : page.index("## Check it")]
    assert all(fact in " ".join(text.split()) for text in (note, about))


# verify


def test_sparse_checkpoint_passes_verification(sparse: Folder) -> None:
    verdict = verify_folder(sparse.store(), None)
    assert (verdict.problems, verdict.num_linears, verdict.num_shards) == ((), 192, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "bits", "words"),
    [
        ("weight_sparse_packed", 0x10, "unit L001-E000-007"),
        ("weight_sparse_mask", 0x01, "exactly 2 of 4 bits"),
        ("weight_scale", 0x01, "unit L001-E000-007"),
        ("input_global_scale", 0x01, "input_global_scale: expected gate's"),
    ],
)
def test_verification_of_a_sparse_checkpoint_finds_a_changed_bit(
    sparse: Folder, suffix: str, bits: int, words: str
) -> None:
    problems = verify_folder(sparse.flipped(f"{LINEAR}.{suffix}", 0, bits).store(), None).problems
    assert any(words in p for p in problems), problems


def test_verification_finds_a_mask_over_other_zero_bytes(sparse: Folder) -> None:
    """Such bytes decode to the same weights, but are not what a conversion writes."""
    tensors = read_file(sparse.files[sparse.file_of(f"{LINEAR}.weight_scale")])
    kept, mask = (
        tensors[f"{LINEAR}.{suffix}"][2]
        for suffix in ("weight_sparse_packed", "weight_sparse_mask")
    )
    nibbles = [byte >> shift & 15 for byte in mask for shift in (0, 4)]
    # the first byte is a kept zero, and the second lies at 2 or 3: so a zero at 1 may stand for the
    # one at 0
    chunk = next(
        c for c, nibble in enumerate(nibbles) if nibble in (0b0101, 0b1001) and kept[2 * c] == 0
    )
    changed = mask[chunk // 2] ^ 0b0011 << 4 * (chunk % 2)
    problems = verify_folder(
        sparse.with_bytes(f"{LINEAR}.weight_sparse_mask", chunk // 2, bytes([changed])).store(),
        None,
    ).problems
    assert [p for p in problems if "other zero bytes" in p] == list(problems) and len(problems) == 1


def test_verification_names_what_is_missing_from_a_sparse_checkpoint(sparse: Folder) -> None:
    file = sparse.file_of(f"{LINEAR}.weight_scale")
    tensors = {n: t for n, t in sparse.tensors(file).items() if n != f"{LINEAR}.weight_sparse_mask"}
    problems = verify_folder(sparse.with_tensors(file, tensors).store(), None).problems
    assert f"{LINEAR}.weight_sparse_mask: missing" in problems


def test_sparse_checkpoint_passes_verification_beside_its_source(
    sparse: Folder, finished: SmallRun
) -> None:
    verdict = verify_folder(sparse.store(), LocalStore(finished.source))
    assert (verdict.problems, verdict.compared_with_source, verdict.num_linears) == ((), True, 192)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (f"{LINEAR}.weight_sparse_packed", "unit L001-E000-007: expected the bytes with SHA-256"),
        (f"{LINEAR}.weight_sparse_mask", "unit L001-E000-007: .*exactly 2 of 4 bits"),
        (f"{LINEAR}.weight_scale", "relative weight error .*, but the manifest claims"),
        (UNTOUCHED, f"{UNTOUCHED}: bytes differ from the source's"),
    ],
)
def test_verification_of_a_sparse_checkpoint_beside_its_source_finds_a_changed_bit(
    sparse: Folder, finished: SmallRun, tensor: str, words: str
) -> None:
    bits = 0x40 if tensor.endswith("weight_scale") else 0x01
    problems = verify_folder(
        sparse.flipped(tensor, 0, bits).store(), LocalStore(finished.source)
    ).problems
    assert any(re.search(words, p) for p in problems), problems


# refusals


def test_three_pairs_in_a_pair_group_are_refused_by_the_tensors_name(dense: Folder) -> None:
    folder = dense.with_bytes(f"{LINEAR}.weight_packed", 8, b"\x11\x12\x13\x00")
    with pytest.raises(
        SourceError,
        match=rf"{LINEAR}\.weight_packed: paired-4:8: expected at most 2.*first at \(0, 2\)",
    ):
        converted(folder, "sparse")


def test_scales_that_differ_within_32_inputs_are_refused_by_the_tensors_name(dense: Folder) -> None:
    with pytest.raises(
        SourceError,
        match=(
            rf"{LINEAR}\.weight_scale: expected the two scales of every 32 inputs to be"
            r" equal.*found 1 pairs"
        ),
    ):
        converted(dense.flipped(f"{LINEAR}.weight_scale", 1, 0x01), "sparse")


@pytest.mark.parametrize(("key", "value"), [("scale_span", 16), ("sparsity", "none")])
def test_checkpoints_of_another_plan_are_refused_before_a_byte_is_written(
    dense: Folder, key: str, value: object
) -> None:
    target = Folder({}).store()
    with pytest.raises(
        SourceError,
        match=(
            rf"{key}: expected .* for sparse storage, found {value} \(of"
            r" language_model\..*gate_proj"
        ),
    ):
        convert_folder(resealed(dense, **{key: value}).store(), target, "sparse", None)
    assert contents(target).files == {}


@pytest.mark.parametrize("to", ["dense", "sparse"])
def test_bytes_that_are_not_those_that_were_verified_are_refused(
    dense: Folder, sparse: Folder, to: str
) -> None:
    folder, suffix = (
        (dense, "weight_global_scale") if to == "sparse" else (sparse, "weight_sparse_packed")
    )
    with pytest.raises(
        ShardCorruptError, match="unit L001-E000-007: expected the bytes with SHA-256"
    ):
        converted(folder.flipped(f"{LINEAR}.{suffix}", 0, 0x01), to)


def test_storage_that_is_there_already_is_refused(dense: Folder, sparse: Folder) -> None:
    for folder, storage in ((dense, "dense"), (sparse, "sparse")):
        with pytest.raises(ConfigError, match=f"has {storage} storage already"):
            converted(folder, storage)


def test_unknown_sparse_layouts_are_refused(sparse: Folder) -> None:
    def newer(config: dict) -> None:
        config["quantization_config"]["paired48_sparse"]["version"] = 2

    folder = resealed(sparse.with_json("config.json", newer))
    for act in (
        lambda: converted(folder, "dense"),
        lambda: verify_folder(folder.store(), None),
    ):
        with pytest.raises(
            SourceError,
            match=(
                r"paired48_sparse: expected \{'layout': 'pair-bitmask', 'version': 1\}, found"
                r" .*'version': 2"
            ),
        ):
            act()


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_in_a_form_that_could_not_be_restored_are_refused(dense: Folder, name: str) -> None:
    folder = resealed(dense.with_file(name, json.dumps(dense.json(name)).encode()))
    with pytest.raises(SourceError, match=f"{name}: expected it as p48ray writes it"):
        converted(folder, "sparse")


def test_damaged_checkpoints_are_refused(dense: Folder) -> None:
    cases = [
        (
            dense.with_file("config.json", dense.files["config.json"] + b" "),
            "config.json: expected SHA-256",
        ),
        (dense.without_file(dense.shards[0]), "which is not there"),
        (dense.with_file(dense.shards[0], dense.files[dense.shards[0]][:-1]), "truncated"),
    ]
    for folder, words in cases:
        with pytest.raises(SourceError, match=words):
            converted(folder, "sparse")


# the target


@pytest.mark.parametrize("other", ["something.txt", "model-00001-of-00006.safetensors", MANIFEST])
def test_folders_with_anything_in_them_are_left_alone(dense: Folder, other: str) -> None:
    target = Folder({other: b"mine"}).store()
    with pytest.raises(ConfigError, match=f"expected a new or empty folder, found {other}"):
        convert_folder(dense.store(), target, "sparse", None)
    assert contents(target).files == {other: b"mine"}


@pytest.mark.parametrize("place", ["", "out", "deep/er"])
def test_target_in_the_checkpoint_is_refused(dense: Folder, tmp_path: Path, place: str) -> None:
    """There nothing but the checkpoint may lie."""
    for name, data in dense.files.items():
        (tmp_path / name).write_bytes(data)
    target = LocalStore(tmp_path / place)
    with pytest.raises(ConfigError, match="expected a folder apart from the checkpoint"):
        convert_folder(LocalStore(tmp_path), target, "sparse", None)
    assert {path.name for path in tmp_path.rglob("*")} == dense.files.keys()


@pytest.mark.parametrize("num_before", [0, 1, 5, 6])
def test_interrupted_conversions_go_on_and_do_nothing_twice(
    dense: Folder, sparse: Folder, num_before: int
) -> None:
    source, target = dense.store(), Folder({}).store()
    survey = survey_conversion(source, target, "sparse")
    begin_conversion(survey.target, survey.note)
    for shard in survey.shards[:num_before]:
        convert_shard(shard)
    written = target.traffic.bytes_written
    convert_folder(source, target, "sparse", None)
    assert contents(target).changed_from(sparse) == []
    again = sum(len(sparse.files[s.file]) for s in survey.shards[num_before:])
    small = sum(
        len(data) for name, data in sparse.files.items() if not name.endswith(".safetensors")
    )
    assert target.traffic.bytes_written - written == again + small + len(survey.note.to_json())


def test_half_done_conversions_have_no_index_and_other_checkpoints_do_not_go_on_with_them(
    dense: Folder,
) -> None:
    target = Folder({}).store()
    with pytest.raises(SourceError):
        convert_folder(
            dense.with_bytes(f"{LINEAR}.weight_packed", 8, b"\x11\x12\x13\x00").store(),
            target,
            "sparse",
            None,
        )
    held = contents(target).files
    assert NOTE_FILE in held and INDEX not in held and MANIFEST not in held
    with pytest.raises(
        ConfigError, match="unfinished conversion to sparse storage of another checkpoint"
    ):
        convert_folder(resealed(dense, plan_digest="0" * 64).store(), target, "sparse", None)


def test_finished_conversions_are_found_and_left_as_they_are(dense: Folder, sparse: Folder) -> None:
    target = sparse.store()
    found = convert_folder(dense.store(), target, "sparse", None)
    assert found.was_there and target.traffic.bytes_written == sum(map(len, sparse.files.values()))


def test_tasks_return_errors_of_ours(dense: Folder) -> None:
    folder = dense.flipped(f"{LINEAR}.weight_scale", 1, 0x01)
    survey = survey_conversion(folder.store(), Folder({}).store(), "sparse")
    found = [returning_errors(convert_shard)(shard) for shard in survey.shards]
    assert [type(f) for f in found if isinstance(f, P48Error)] == [SourceError]


def test_tensors_outside_of_the_experts_are_copied_as_they_are(
    dense: Folder, sparse: Folder
) -> None:
    before, after = (read_file(f.files[f.file_of(UNTOUCHED)]) for f in (dense, sparse))
    assert after[UNTOUCHED] == before[UNTOUCHED]
    assert torch.equal(
        sparse.tensors(sparse.file_of(UNTOUCHED))[UNTOUCHED],
        dense.tensors(dense.file_of(UNTOUCHED))[UNTOUCHED],
    )
