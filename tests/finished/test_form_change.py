"""Conversion to ModelOpt's layout and back: an independent reader finds the same weights, every
byte comes back, and what can not go there is refused by name before anything is written."""

import hashlib
import json
import math
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from p48ray.errors import ConfigError, P48Error, ShardCorruptError, SourceError
from p48ray.finished.convert import NOTE_FILE, begin_conversion, convert_shard, survey_conversion
from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.run.checkpoint_manifest import CheckpointManifest, ModelOptForm
from p48ray.store import LocalStore, MemoryStore
from tests.reference import modelopt
from tests.reference.sparse_storage import read_file
from tests.stages.damage import INDEX, Folder
from tests.stages.small_run import SmallRun

MANIFEST, HF_QUANT = "p48ray.json", "hf_quant_config.json"
LINEAR = "language_model.model.layers.1.mlp.experts.3.up_proj"
PAIRS = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}


def contents(store: MemoryStore) -> Folder:
    return Folder({info.key: store.get(info.key) for info in store.list()})


def converted(folder: Folder, to: str) -> Folder:
    target = Folder({}).store()
    convert_folder(folder.store(), target, to, None)
    return contents(target)


def resealed(folder: Folder, **changes: object) -> Folder:
    """With another manifest that is sound in itself, and says of files and headers what they
    are."""
    manifest = CheckpointManifest.from_json(folder.files[MANIFEST], MANIFEST)
    files = {name: hashlib.sha256(folder.files[name]).hexdigest() for name in manifest.file_sha256}
    headers = {}
    for file in manifest.header_sha256:
        length = int.from_bytes(folder.files[file][:8], "little")
        headers[file] = hashlib.sha256(folder.files[file][: 8 + length]).hexdigest()
    update = {"file_sha256": files, "header_sha256": headers, **changes}
    return folder.with_file(MANIFEST, manifest.model_copy(update=update).sealed().to_json())


@pytest.fixture
def dense(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


@pytest.fixture(scope="module")
def nvidia(finished: SmallRun) -> Folder:
    return converted(Folder.read(finished.checkpoint), "modelopt")


def linears(folder: Folder) -> list[str]:
    return list(folder.json(MANIFEST)["relative_weight_errors"])


def test_every_file_comes_back_byte_for_byte(dense: Folder, nvidia: Folder) -> None:
    assert converted(nvidia, "dense").changed_from(dense) == []
    assert set(nvidia.changed_from(dense)) == {
        *dense.shards[:4],  # the others hold no expert
        *("README.md", "config.json", INDEX, MANIFEST, HF_QUANT),
    }


def test_independent_reader_finds_the_same_weights(dense: Folder, nvidia: Folder) -> None:
    """Codes and block scales alike; each weight within the rounding of one reciprocal."""
    before, after = (modelopt.read_all(f.files) for f in (dense, nvidia))
    assert len(linears(dense)) == 192
    for linear in linears(dense):
        divisor = struct.unpack("<f", before[f"{linear}.weight_global_scale"][2])[0]
        dtype, shape, raw = before[f"{linear}.weight_packed"]
        as_divided = {
            f"{linear}.weight": (dtype, shape, raw),
            f"{linear}.weight_scale": before[f"{linear}.weight_scale"],
            f"{linear}.weight_scale_2": ("F32", [], struct.pack("<f", 1)),
        }
        expected = modelopt.weight(as_divided, linear) / divisor
        found = modelopt.weight(after, linear)
        assert np.abs(found).max() > 0 and np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=2**-24, atol=0)
        for suffix in ("weight_packed", "weight_scale"):
            assert after[f"{linear}.{PAIRS[suffix]}"] == before[f"{linear}.{suffix}"]


def test_scalars_are_the_nearest_reciprocals_and_all_else_is_the_same(
    dense: Folder, nvidia: Folder
) -> None:
    before, after = (modelopt.read_all(f.files) for f in (dense, nvidia))
    for linear in linears(dense):
        for suffix in ("weight_global_scale", "input_global_scale"):
            (divisor,) = struct.unpack("<f", before.pop(f"{linear}.{suffix}")[2])
            nearest = struct.unpack("<f", struct.pack("<f", 1 / divisor))[0]
            assert modelopt.scalar(after.pop(f"{linear}.{PAIRS[suffix]}")) == nearest
        for suffix in ("weight_packed", "weight_scale"):
            del before[f"{linear}.{suffix}"], after[f"{linear}.{PAIRS[suffix]}"]
    assert before == after and len(before) > 90


def test_index_places_every_tensor_and_states_their_bytes(dense: Folder, nvidia: Folder) -> None:
    held = {n: file for file in nvidia.shards for n in read_file(nvidia.files[file])}
    index = nvidia.json(INDEX)
    assert index["weight_map"] == held and list(index["weight_map"]) == sorted(held)
    assert index["metadata"] == dense.json(INDEX)["metadata"]


def test_both_configurations_say_nvfp4_and_the_same_exclusions(
    dense: Folder, nvidia: Folder
) -> None:
    config, older = nvidia.json("config.json"), nvidia.json(HF_QUANT)["quantization"]
    ours = config.pop("quantization_config")
    assert (ours["quant_method"], ours["quant_algo"]) == ("modelopt", "NVFP4")
    assert ours["ignore"] == older["exclude_modules"] and "*.self_attn.*" in ours["ignore"]
    assert (older["quant_algo"], older["group_size"]) == ("NVFP4", 16)
    plain = dense.json("config.json")
    del plain["quantization_config"]
    assert config == plain


def test_p48ray_json_keeps_the_divisors_and_has_no_such_key_in_another_form(
    dense: Folder, nvidia: Folder
) -> None:
    before, kept = modelopt.read_all(dense.files), nvidia.json(MANIFEST)["modelopt"]
    assert kept["global_scales"] == {
        linear: [
            struct.unpack("<f", before[f"{linear}.{s}"][2])[0]
            for s in ("weight_global_scale", "input_global_scale")
        ]
        for linear in linears(dense)
    }
    assert "modelopt" not in dense.json(MANIFEST)
    assert "modelopt" not in converted(dense, "sparse").json(MANIFEST)


def test_card_says_how_it_is_stored_and_forgets_it_again(dense: Folder, nvidia: Folder) -> None:
    card = nvidia.files["README.md"].decode()
    assert "`weight_scale_2`" in card and card.index("## ModelOpt") < card.index("## Serving")
    assert "ModelOpt" not in dense.files["README.md"].decode()


# verify


def test_it_passes_verification_and_is_not_held_against_a_source(
    nvidia: Folder, finished: SmallRun
) -> None:
    verdict = verify_folder(nvidia.store(), None)
    assert (verdict.problems, verdict.num_linears, verdict.num_shards) == ((), 192, 6)
    with pytest.raises(ConfigError, match=r"--source: expected .*compressed-tensors.*found one in"):
        verify_folder(nvidia.store(), LocalStore(finished.source))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (f"{LINEAR}.weight", "unit L001-E000-007: expected the bytes with SHA-256"),
        (f"{LINEAR}.weight_scale", "unit L001-E000-007: expected the bytes with SHA-256"),
        (f"{LINEAR}.weight_scale_2", r"up_proj.weight_scale_2: expected .* of p48ray.json, found"),
        (f"{LINEAR}.input_scale", r"up_proj.input_scale: expected .* of p48ray.json, found"),
        ("vision_tower.patch_embed.proj.weight", "bytes differ from those that were verified"),
    ],
)
def test_verification_and_the_way_back_find_a_changed_bit(
    nvidia: Folder, tensor: str, words: str
) -> None:
    folder = nvidia.flipped(tensor, 0, 0x01)
    assert re.search(words, verify_folder(folder.store(), None).problems[0])
    if tensor.startswith("vision"):  # what passes through is verify's
        return
    with pytest.raises(P48Error, match=words):
        converted(folder, "dense")


def test_kept_divisors_that_are_others_are_found(nvidia: Folder) -> None:
    """A sound manifest of other divisors with the same reciprocals: the units' digests tell."""
    kept = nvidia.json(MANIFEST)["modelopt"]
    pairs = kept["global_scales"]
    linear, neighbour = next(
        (name, other)
        for name, (divisor, _) in pairs.items()
        for other in neighbours(divisor)
        if struct.pack("<f", 1 / other) == struct.pack("<f", 1 / divisor)
    )
    changed = {**pairs, linear: [neighbour, pairs[linear][1]]}
    folder = resealed(nvidia, modelopt=ModelOptForm(**kept | {"global_scales": changed}))
    assert any("SHA-256" in p for p in verify_folder(folder.store(), None).problems)
    with pytest.raises(ShardCorruptError, match="expected the bytes with SHA-256"):
        converted(folder, "dense")


def neighbours(divisor: float) -> list[float]:
    (bits,) = struct.unpack("<I", struct.pack("<f", divisor))
    return [struct.unpack("<f", struct.pack("<I", bits + step))[0] for step in (-1, 1)]


# the target


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("num_before", [0, 1, 6])
def test_interrupted_conversions_go_on_and_do_nothing_twice(
    dense: Folder, nvidia: Folder, to: str, num_before: int
) -> None:
    before, after = (dense, nvidia) if to == "modelopt" else (nvidia, dense)
    source, target = before.store(), Folder({}).store()
    survey = survey_conversion(source, target, to)
    begin_conversion(survey.target, survey.note)
    for shard in survey.shards[:num_before]:
        convert_shard(shard)
    written = target.traffic.bytes_written
    convert_folder(source, target, to, None)
    assert contents(target).changed_from(after) == []
    again = sum(len(after.files[s.file]) for s in survey.shards[num_before:])
    small = sum(len(data) for n, data in after.files.items() if not n.endswith(".safetensors"))
    assert target.traffic.bytes_written - written == again + small + len(survey.note.to_json())
    assert convert_folder(source, target, to, None).was_there


def test_an_unfinished_conversion_to_another_form_is_left_alone(dense: Folder) -> None:
    source, target = dense.store(), Folder({}).store()
    begin_conversion(target, survey_conversion(source, target, "sparse").note)
    with pytest.raises(ConfigError, match="unfinished conversion to sparse storage"):
        survey_conversion(source, target, "modelopt")
    assert contents(target).files.keys() == {NOTE_FILE}


# refusals: nothing is written


def refused(folder: Folder, to: str, error: type[P48Error], words: str) -> None:
    target = Folder({}).store()
    with pytest.raises(error, match=words):
        convert_folder(folder.store(), target, to, None)
    assert contents(target).files == {}


def test_sparse_storage_is_refused_by_name_both_ways(dense: Folder, nvidia: Folder) -> None:
    sparse = converted(dense, "sparse")
    refused(sparse, "modelopt", ConfigError, "expected dense storage.*found sparse storage")
    refused(nvidia, "sparse", ConfigError, "expected dense storage.*found ModelOpt's layout")
    refused(nvidia, "modelopt", ConfigError, "has ModelOpt's layout already")


@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -3.0, 1e-39])
def test_divisors_without_a_reciprocal_are_refused_by_file_and_tensor(
    dense: Folder, suffix: str, value: float
) -> None:
    name = f"{LINEAR}.{suffix}"
    folder = dense.with_bytes(name, 0, struct.pack("<f", value))
    file = dense.file_of(name)
    refused(folder, "modelopt", SourceError, rf"{file}: {name}: expected .*, found -?(\d|nan|inf)")


@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("value", [0.0, math.nan, 1.0])
def test_factors_that_are_no_reciprocals_are_refused_on_the_way_back(
    nvidia: Folder, suffix: str, value: float
) -> None:
    name = f"{LINEAR}.{suffix}"
    folder = nvidia.with_bytes(name, 0, struct.pack("<f", value))
    file = nvidia.file_of(name)
    refused(folder, "dense", SourceError, rf"{file}: {name}: expected .*, found {value}")


@pytest.mark.parametrize(
    ("form", "suffix"), [("dense", "weight_global_scale"), ("modelopt", "input_scale")]
)
def test_a_missing_scalar_is_refused_by_file_and_tensor(
    dense: Folder, nvidia: Folder, form: str, suffix: str
) -> None:
    folder, to = (dense, "modelopt") if form == "dense" else (nvidia, "dense")
    name = f"{LINEAR}.{suffix}"
    file = folder.file_of(name)
    tensors = {n: t for n, t in folder.tensors(file).items() if n != name}
    refused(folder.with_tensors(file, tensors), to, SourceError, f"{file}: {name}: missing")


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda data: data[:100], "expected a header of .* bytes, found a file of 100 bytes"),
        (lambda data: data[:4], "expected at least 8 bytes"),
        (lambda data: data[:-1], "truncated"),
    ],
)
@pytest.mark.parametrize("form", ["dense", "modelopt"])
def test_half_downloaded_shards_are_refused_by_file(
    dense: Folder, nvidia: Folder, form: str, cut: Callable[[bytes], bytes], words: str
) -> None:
    folder, to = (dense, "modelopt") if form == "dense" else (nvidia, "dense")
    file = folder.shards[1]
    refused(folder.with_file(file, cut(folder.files[file])), to, SourceError, f"{file}.*{words}")


def test_a_folder_of_neither_format_is_refused(dense: Folder) -> None:
    def other(config: dict) -> None:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}

    words = r"config\.json: quantization_config\.format: expected .*found None, .*'FP8'"
    refused(resealed(dense.with_json("config.json", other)), "modelopt", SourceError, words)
    refused(dense.without_file(MANIFEST), "modelopt", ConfigError, "found no p48ray.json")
    refused(Folder({}), "modelopt", ConfigError, "found no p48ray.json")


def test_a_modelopt_folder_without_kept_divisors_is_refused(nvidia: Folder) -> None:
    words = "p48ray.json: modelopt: .*announces ModelOpt's layout, found none"
    refused(resealed(nvidia, modelopt=None), "dense", SourceError, words)
    kept = nvidia.json(MANIFEST)["modelopt"]
    del kept["global_scales"][LINEAR]
    words = rf"modelopt\.global_scales: expected the linears .*found {LINEAR}"
    folder = resealed(nvidia, modelopt=ModelOptForm(**kept))
    refused(folder, "dense", SourceError, words)
    with pytest.raises(SourceError, match=words):
        verify_folder(folder.store(), None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(ignore=[]), r"ignore: expected names of all linears"),
        (lambda q: q["ignore"].append("re:.*gate"), r"ignore: expected .*, found 're:\.\*gate'"),
        (lambda q: q["ignore"].append("experts"), r"ignore: .*found 'experts', which readers take"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 4}), r"kv_cache_scheme: expected null or"),
    ],
)
def test_what_modelopts_files_can_not_say_is_refused_by_its_key(
    dense: Folder, change: Callable[[dict], object], words: str
) -> None:
    config = dense.json("config.json")
    change(config["quantization_config"])
    data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    folder = resealed(dense.with_file("config.json", data))
    refused(folder, "modelopt", SourceError, f"config.json: quantization_config.{words}")


def test_config_in_a_form_that_could_not_be_restored_is_refused(dense: Folder) -> None:
    folder = resealed(
        dense.with_file("config.json", json.dumps(dense.json("config.json")).encode())
    )
    refused(folder, "modelopt", SourceError, "config.json: expected it as p48ray writes it")


def test_nothing_lies_beside_a_local_target_after_a_refusal(dense: Folder) -> None:
    name = f"{LINEAR}.weight_global_scale"
    folder = dense.with_bytes(name, 0, struct.pack("<f", 0))
    with tempfile.TemporaryDirectory() as place:
        with pytest.raises(SourceError):
            convert_folder(folder.store(), LocalStore(Path(place) / "out"), "modelopt", None)
        assert list(Path(place).iterdir()) == []
