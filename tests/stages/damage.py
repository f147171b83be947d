"""A finished checkpoint in memory, and ways to damage it. Files are read and written with
safetensors' own library or byte by byte."""

import json
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from p48ray.store import MemoryStore

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Folder:
    """The files of a checkpoint; every change is a new Folder."""

    files: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path) -> "Folder":
        return cls({file.name: file.read_bytes() for file in sorted(path.iterdir())})

    def store(self) -> MemoryStore:
        """These files as a store of their own."""
        store = MemoryStore(uuid.uuid4().hex)
        for name, data in self.files.items():
            store.put(name, data)
        return store

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    def file_of(self, tensor: str) -> str:
        """By the index."""
        file: str = self.json(INDEX)["weight_map"][tensor]
        return file

    def tensors(self, file: str) -> dict[str, Tensor]:
        return load(self.files[file])

    def place(self, tensor: str) -> tuple[str, int, int]:
        """(file, first byte, number of bytes) of a tensor's data."""
        file = self.file_of(tensor)
        (length,) = struct.unpack("<Q", self.files[file][:8])
        start, end = json.loads(self.files[file][8 : 8 + length])[tensor]["data_offsets"]
        return file, 8 + length + start, end - start

    def with_file(self, name: str, data: bytes) -> "Folder":
        return Folder({**self.files, name: data})

    def without_file(self, name: str) -> "Folder":
        return Folder({other: data for other, data in self.files.items() if other != name})

    def with_bytes(self, tensor: str, at: int, data: bytes) -> "Folder":
        """`data` in place of the tensor's bytes from `at` on."""
        file, start, size = self.place(tensor)
        assert at + len(data) <= size
        old = self.files[file]
        return self.with_file(file, old[: start + at] + data + old[start + at + len(data) :])

    def flipped(self, tensor: str, at: int, bits: int) -> "Folder":
        """One byte of a tensor xor `bits`."""
        file, start, _ = self.place(tensor)
        return self.with_bytes(tensor, at, bytes([self.files[file][start + at] ^ bits]))

    def with_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> "Folder":
        """The shard written anew with these tensors."""
        return self.with_file(file, save(dict(tensors), metadata={"format": "pt"}))

    def with_json(self, name: str, change: Callable[[Any], object]) -> "Folder":
        """The file's JSON after `change` was called with it."""
        value = self.json(name)
        change(value)
        return self.with_file(name, json.dumps(value).encode())

    def changed_from(self, other: "Folder") -> list[str]:
        """Names of the files that differ, or that only one of the two has."""
        return [
            name
            for name in {**self.files, **other.files}
            if self.files.get(name) != other.files.get(name)
        ]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
