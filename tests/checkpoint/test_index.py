"""Opening a folder: what is in it, which checkpoint it is, and every way in which index and files
can disagree."""

import json
import pickle
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p48ray.checkpoint.index import EDGE_BYTES, CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import ModelLayout
from p48ray.errors import SourceError
from p48ray.store import ByteRange, LocalStore, MemoryStore
from tests.checkpoint.entries import read_entries, serialize
from tests.checkpoint.tiny_variants import TINY

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-000003.safetensors"
SECOND = "model-00002-of-000003.safetensors"

Copy = Callable[[], MemoryStore]


def edit_index(store: MemoryStore, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads(store.get(INDEX))
    edit(index["weight_map"])
    store.put(INDEX, json.dumps(index).encode())


def test_sample_is_opened_with_all_its_parts(
    tiny: CheckpointIndex, tiny_tensors: dict[str, Tensor]
) -> None:
    assert tiny.tensors.keys() == tiny_tensors.keys()
    assert tiny.files == (FIRST, SECOND, "model-00003-of-000003.safetensors")
    assert tiny.config["model_type"] == "kimi_k25"
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
    } <= set(tiny.sidecars)
    assert not {"config.json", INDEX, *tiny.files} & set(tiny.sidecars)
    assert len(bytes.fromhex(tiny.fingerprint)) == 32


def test_index_survives_pickling_as_workers_get_it(tiny: CheckpointIndex) -> None:
    again = pickle.loads(pickle.dumps(tiny))
    assert again.fingerprint == tiny.fingerprint
    assert again.tensors == tiny.tensors


def test_what_is_outside_the_experts_is_that_of_the_index_and_the_layout_asked(
    tiny: CheckpointIndex, layout: ModelLayout
) -> None:
    outside = tiny.outside_experts(layout)
    names = [name for name in tiny.tensors if ".mlp.experts." not in name]
    assert [entry.name for entry in outside] == names
    assert tiny.outside_experts(layout) is outside

    fewer_layers = tiny.outside_experts(replace(layout, num_layers=4))
    last = [name for name in tiny.tensors if ".layers.4.mlp.experts." in name]
    assert {entry.name for entry in fewer_layers} == {*names, *last} and last

    kept = {name: entry for name, entry in tiny.tensors.items() if name != names[0]}
    fewer = replace(tiny, tensors=kept)
    assert [entry.name for entry in fewer.outside_experts(layout)] == names[1:]


def test_experts_have_the_bytes_that_all_others_have_not(
    tiny: CheckpointIndex, layout: ModelLayout
) -> None:
    experts = [e.num_bytes for name, e in tiny.tensors.items() if ".mlp.experts." in name]
    assert tiny.expert_bytes(layout) == sum(experts) < tiny.num_bytes
    assert tiny.num_bytes == sum(entry.num_bytes for entry in tiny.tensors.values())


def test_sidecars_are_top_level_files_that_go_with_any_weights(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    for key in ["LICENSE", "chat_template.jinja", "modeling_x.py", "tiktoken.model"]:
        store.put(key, b"carry")
    for key in [
        ".gitattributes",
        "README.md",
        "figures/logo.png",
        ".cache/x",
        "old.bin",
        "stray.safetensors",
        "x.gguf",
        "pytorch_model.bin.index.json",
    ]:
        store.put(key, b"leave")
    before = set(open_checkpoint(LocalStore(TINY)).sidecars)
    assert set(open_checkpoint(store).sidecars) - before == {
        "LICENSE",
        "chat_template.jinja",
        "modeling_x.py",
        "tiktoken.model",
    }


def test_single_file_checkpoint_needs_no_index() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    store.put("config.json", b"{}")
    store.put("model.safetensors", serialize({"a": torch.zeros(2)}))
    index = open_checkpoint(store)
    assert index.files == ("model.safetensors",)
    assert list(index.tensors) == ["a"]


def test_folder_without_config_or_weights_is_refused(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    store.delete("config.json")
    with pytest.raises(SourceError, match=r"config\.json: expected in memory://.*found none"):
        open_checkpoint(store)
    store = copy_of_tiny()
    store.delete(INDEX)
    with pytest.raises(SourceError, match=rf"{INDEX} or model\.safetensors in memory://.*neither"):
        open_checkpoint(store)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_unsound_json_is_refused_naming_the_file(copy_of_tiny: Copy, file: str, raw: bytes) -> None:
    store = copy_of_tiny()
    store.put(file, raw)
    with pytest.raises(SourceError, match=rf"^{file}: expected"):
        open_checkpoint(store)


def test_index_without_a_weight_map_or_with_a_repeated_tensor_is_refused(
    copy_of_tiny: Copy,
) -> None:
    store = copy_of_tiny()
    store.put(INDEX, b'{"metadata": {}}')
    with pytest.raises(
        SourceError, match=f"^{INDEX}: expected an object at weight_map, found NoneType"
    ):
        open_checkpoint(store)
    store.put(INDEX, b'{"weight_map": {"a.x": "f.safetensors", "a.x": "g.safetensors"}}')
    with pytest.raises(SourceError, match=rf"^{INDEX}: .*'a\.x' more than once"):
        open_checkpoint(store)
    store.put(INDEX, b'{"weight_map": {}}')
    with pytest.raises(SourceError, match="found no tensor"):
        open_checkpoint(store)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "x.bin",
        ".x.safetensors",
        "a..safetensors",
        "",
        5,
        None,
    ],
)
def test_file_names_that_leave_the_folder_are_refused_naming_the_entry(
    copy_of_tiny: Copy, file: object
) -> None:
    store = copy_of_tiny()
    name = "language_model.lm_head.weight"
    edit_index(store, lambda weight_map: weight_map.update({name: file}))
    with pytest.raises(
        SourceError, match=rf"^{INDEX}: weight_map\['{name}'\]: expected the plain name.*found"
    ) as caught:
        open_checkpoint(store)
    assert repr(file) in str(caught.value)


def test_missing_shards_are_named(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    store.delete(FIRST)
    store.delete(SECOND)
    with pytest.raises(SourceError, match=rf"{INDEX}.*{FIRST}, {SECOND}"):
        open_checkpoint(store)


def test_tensor_of_the_index_that_its_file_lacks_is_named(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    edit_index(store, lambda weight_map: weight_map.update({"ghost.weight": SECOND}))
    with pytest.raises(
        SourceError, match=rf"{INDEX}.*not in the header.*ghost\.weight in {SECOND}$"
    ):
        open_checkpoint(store)


def test_tensor_in_another_file_than_the_index_says_is_named(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    name = next(iter(read_entries(store, FIRST)))
    edit_index(store, lambda weight_map: weight_map.update({name: SECOND}))
    with pytest.raises(SourceError, match=rf"not in the header.*{name} in {SECOND}$"):
        open_checkpoint(store)


def test_tensor_that_the_index_does_not_name_is_named(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    name = next(iter(read_entries(store, FIRST)))
    edit_index(store, lambda weight_map: weight_map.pop(name))
    with pytest.raises(SourceError, match=rf"{INDEX}.*{name} in {FIRST} \(index: None\)$"):
        open_checkpoint(store)


def test_tensor_held_by_two_files_is_refused() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    store.put("config.json", b"{}")
    store.put("a.safetensors", serialize({"x": torch.zeros(2)}))
    store.put("b.safetensors", serialize({"x": torch.ones(2), "y": torch.ones(1)}))
    store.put(
        INDEX, json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}).encode()
    )
    with pytest.raises(SourceError, match=r"x in b\.safetensors \(index: a\.safetensors\)"):
        open_checkpoint(store)


def test_long_lists_are_cut_after_five(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    edit_index(
        store,
        lambda weight_map: weight_map.update({f"ghost{number}": FIRST for number in range(9)}),
    )
    with pytest.raises(SourceError, match=r"ghost4 in \S+ and 4 more$"):
        open_checkpoint(store)


def test_truncated_shard_is_named(copy_of_tiny: Copy) -> None:
    store = copy_of_tiny()
    size = len(store.get(SECOND))
    store.put(SECOND, store.get(SECOND)[:-1])
    with pytest.raises(
        SourceError,
        match=rf"^{SECOND}: expected {size} bytes by its header, found a file of {size - 1} bytes",
    ):
        open_checkpoint(store)


def test_fingerprint_stays_when_the_folder_moves(
    tiny: CheckpointIndex, tmp_path: Path, copy_of_tiny: Copy
) -> None:
    shutil.copytree(TINY, tmp_path / "elsewhere")
    assert open_checkpoint(LocalStore(tmp_path / "elsewhere")).fingerprint == tiny.fingerprint
    store = copy_of_tiny()
    store.put("README.md", b"sidecars are not the model")
    assert open_checkpoint(store).fingerprint == tiny.fingerprint


def flipped(store: MemoryStore, file: str, position: int) -> None:
    data = bytearray(store.get(file))
    data[position] ^= 1
    store.put(file, bytes(data))


@pytest.mark.parametrize("where", ["first", "end of first edge", "start of last edge", "last"])
def test_fingerprint_changes_with_a_byte_at_either_edge_of_the_data(
    tiny: CheckpointIndex, copy_of_tiny: Copy, where: str
) -> None:
    store = copy_of_tiny()
    size = len(store.get(SECOND))
    data_start = min(entry.start for entry in tiny.tensors.values() if entry.file == SECOND)
    positions = {
        "first": data_start,
        "end of first edge": data_start + EDGE_BYTES - 1,
        "start of last edge": size - EDGE_BYTES,
        "last": size - 1,
    }
    flipped(store, SECOND, positions[where])
    assert open_checkpoint(store).fingerprint != tiny.fingerprint


def test_fingerprint_changes_with_config_index_header_and_size(
    tiny: CheckpointIndex, copy_of_tiny: Copy
) -> None:
    found = {tiny.fingerprint}
    for file in ("config.json", INDEX):
        store = copy_of_tiny()
        store.put(file, store.get(file) + b"\n")
        found.add(open_checkpoint(store).fingerprint)
    # One letter of the header: the same tensors, other metadata.
    store = copy_of_tiny()
    store.put(SECOND, store.get(SECOND).replace(b'"format":"pt"', b'"format":"px"', 1))
    found.add(open_checkpoint(store).fingerprint)
    # A header of another length moves all data: the same tensors and values, another size.
    store = copy_of_tiny()
    data = store.get(SECOND)
    length = int.from_bytes(data[:8], "little")
    store.compose(
        SECOND,
        [
            (length + 8).to_bytes(8, "little"),
            data[8 : 8 + length],
            b" " * 8,
            ByteRange(store, SECOND, 8 + length, len(data) - 8 - length),
        ],
    )
    found.add(open_checkpoint(store).fingerprint)
    assert len(found) == 5


def test_fingerprint_does_not_see_the_middle_of_a_file(
    tiny: CheckpointIndex, copy_of_tiny: Copy
) -> None:
    """The documented limit: identity without reading the weights."""
    store = copy_of_tiny()
    flipped(store, SECOND, len(store.get(SECOND)) // 2)
    assert open_checkpoint(store).fingerprint == tiny.fingerprint
