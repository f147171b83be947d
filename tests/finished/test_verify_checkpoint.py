"""The library that servers load with reads each finished shard's header too."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.stages.shard_proof import compare_with_safetensors
from p48ray.store import LocalStore, MemoryStore
from p48ray.store.view import SubStore
from tests.checkpoint.entries import read_entries

FILE = "model-00001-of-00001.safetensors"
TENSORS = {
    "a": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]},
    "b": {"dtype": "BF16", "shape": [1], "data_offsets": [6, 8]},
}


def write(folder: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


def test_a_sound_shard_is_read_alike_in_a_folder_of_a_run_root_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    write(tmp_path / "checkpoint", {"__metadata__": {"format": "pt"}} | TENSORS)
    for store in (
        LocalStore(tmp_path / "checkpoint"),
        SubStore(LocalStore(tmp_path), "checkpoint/"),
    ):
        assert list(compare_with_safetensors(store, FILE, read_entries(store, FILE))) == []


def test_what_the_two_read_otherwise_is_named(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    store = LocalStore(tmp_path)
    entries = read_entries(store, FILE)
    ours = {
        "a": replace(entries["a"], shape=(3, 2)),
        "c": replace(entries["b"], name="c"),
    }
    assert list(compare_with_safetensors(store, FILE, ours)) == [
        f"{FILE}: b: only safetensors finds this tensor",
        f"{FILE}: c: only p48ray finds this tensor",
        f"{FILE}: a: expected ('F8_E4M3', (3, 2)), safetensors reads ('F8_E4M3', (2, 3))",
    ]


@pytest.mark.parametrize("damage", ["hole", "metadata"])
def test_what_the_library_refuses_is_a_problem_with_its_reason(damage: str, tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    entries = read_entries(LocalStore(tmp_path), FILE)
    bad = {
        "hole": TENSORS | {"b": TENSORS["b"] | {"data_offsets": [5, 7]}},
        "metadata": {"__metadata__": {"format": 1}} | TENSORS,
    }
    write(tmp_path, bad[damage])
    (problem,) = compare_with_safetensors(LocalStore(tmp_path), FILE, entries)
    assert problem.startswith(f"{FILE}: safetensors does not read it: ")


def test_of_what_is_no_file_of_this_machine_there_is_none(tmp_path: Path) -> None:
    store = MemoryStore("second-opinion")
    write(tmp_path, TENSORS)
    store.put(FILE, (tmp_path / FILE).read_bytes())
    assert list(compare_with_safetensors(store, FILE, {})) == []
