"""A checkpoint folder as an index: its config, where every tensor lies, what else is there, which
checkpoint it is. No weights are read.

Kimi-K2.5's 64 headers describe 207,000 tensors: entries are light, and files are read by a few
threads because a bucket answers slowly.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from p48ray.checkpoint.header import TensorEntry, json_object, parse_header, read_header_bytes
from p48ray.checkpoint.layout import LayerNames
from p48ray.checkpoint.sidecars import find_sidecars
from p48ray.collection import nothing_collected
from p48ray.errors import SourceError
from p48ray.store import Store

CONFIG_FILE = "config.json"
CONFIG_KEY = "quantization_config"
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE = "README.md"
SINGLE_FILE = "model.safetensors"
MAX_LISTED = 5
"""Names in one error message; the first few show what is wrong."""

EDGE_BYTES = 64 * 2**10
HEADER_THREADS = 8

_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """A checkpoint's headers. `files` are the weight files; `sidecars` the files that go with any
    weights of the model (tokenizer, code), `left_behind` all others (checkpoint.sidecars)."""

    store: Store
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: tuple[str, ...]
    sidecars: tuple[str, ...]
    fingerprint: str
    """Identity without reading 595 GB: SHA-256 over config, index, all headers, and size, first and
    last 64 KiB of each file's data."""
    left_behind: tuple[str, ...] = ()
    _outside: dict[tuple[str, int], tuple[TensorEntry, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What outside_experts has found out once, by their expert_scope."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def outside_experts(self, names: LayerNames) -> tuple[TensorEntry, ...]:
        """All but the tensors that compression replaces, in the source's order. Names are looked at
        once, because there are many and nearly all are experts'."""
        scope = names.expert_scope
        if scope not in self._outside:
            self._outside[scope] = tuple(
                entry for name, entry in self.tensors.items() if not names.is_expert_tensor(name)
            )
        return self._outside[scope]

    def expert_bytes(self, names: LayerNames) -> int:
        """Of the tensors that compression replaces."""
        return self.num_bytes - sum(entry.num_bytes for entry in self.outside_experts(names))


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is kept of one weight file: its tensors and its part of the fingerprint."""

    file: str
    tensors: dict[str, TensorEntry]
    digest: bytes


@nothing_collected()
def open_checkpoint(store: Store) -> CheckpointIndex:
    """Reads config, index and every header of a Hugging Face folder.

    Raises: SourceError, naming file and key, if a file is missing or unsound, or if the index and
        the headers tell different stories.
    """
    config_raw = _read(store, CONFIG_FILE)
    config = json_object(CONFIG_FILE, config_raw, unique_keys=False)
    index_raw, weight_map = _read_weight_map(store)
    files = (SINGLE_FILE,) if weight_map is None else tuple(sorted(set(weight_map.values())))
    _check_presence(store, files)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        shards = list(pool.map(lambda file: _read_shard(store, file), files))
    if weight_map is not None:
        _check_agreement(weight_map, shards)
    tensors = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    if not tensors:
        raise SourceError(
            f"{store.uri}: expected weights, found no tensor in"
            f" {', '.join(files[:MAX_LISTED]) or INDEX_FILE}"
        )
    fingerprint = _digest(
        [
            config_raw,
            index_raw,
            *(part for shard in shards for part in (shard.file.encode(), shard.digest)),
        ]
    )
    beside = find_sidecars(store, config, {CONFIG_FILE, INDEX_FILE, CARD_FILE, *files})
    return CheckpointIndex(
        store, config, tensors, files, beside.carried, fingerprint.hex(), beside.left
    )


def _read(store: Store, file: str) -> bytes:
    if store.head(file) is None:
        raise SourceError(
            f"{file}: expected in {store.uri}, found none; is this the folder of a Hugging Face"
            " checkpoint?"
        )
    return store.get(file)


def _read_weight_map(store: Store) -> tuple[bytes, dict[str, str] | None]:
    """The index's bytes and its tensor -> file map; no map for a checkpoint of one file. Raises:
    SourceError for names that are paths."""
    if store.head(INDEX_FILE) is None:
        if store.head(SINGLE_FILE) is None:
            raise SourceError(
                f"expected {INDEX_FILE} or {SINGLE_FILE} in {store.uri}, found neither"
            )
        return b"", None
    raw = _read(store, INDEX_FILE)
    weight_map = json_object(INDEX_FILE, raw).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SourceError(
            f"{INDEX_FILE}: expected an object at weight_map, found {type(weight_map).__name__}"
        )
    checked: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        if not isinstance(file, str) or not _PLAIN_FILE.fullmatch(file) or ".." in file:
            raise SourceError(
                f"{INDEX_FILE}: weight_map[{name!r}]: expected the plain name of a .safetensors"
                f" file, found {file!r}"
            )
        checked.add(file)
    return raw, weight_map


def _check_presence(store: Store, files: Iterable[str]) -> None:
    missing = [file for file in files if store.head(file) is None]
    if missing:
        raise SourceError(
            f"{INDEX_FILE} names files that are not in {store.uri}: {_some(missing)}; download them"
        )


def _read_shard(store: Store, file: str) -> _Shard:
    """One file's tensors, and a digest over its header, its size and the edges of its data."""
    raw, size_bytes = read_header_bytes(store, file)
    tensors = parse_header(file, raw, size_bytes)
    data_start = 8 + len(raw)
    edge_bytes = min(EDGE_BYTES, size_bytes - data_start)
    edges = [
        store.get_range(file, start, edge_bytes) for start in (data_start, size_bytes - edge_bytes)
    ]
    return _Shard(file, tensors, _digest([raw, str(size_bytes).encode(), *edges]))


def _check_agreement(weight_map: Mapping[str, str], shards: list[_Shard]) -> None:
    """Raises: SourceError unless the index and the headers place the same tensors in the same
    files."""
    unlisted: list[str] = []
    num_found = 0
    for shard in shards:
        placed = [name for name in shard.tensors if weight_map.get(name) == shard.file]
        num_found += len(placed)
        if len(placed) != len(shard.tensors):
            unlisted += [
                f"{name} in {shard.file} (index: {weight_map.get(name)})"
                for name in shard.tensors.keys() - set(placed)
            ]
    if num_found != len(weight_map):
        by_file = {shard.file: shard.tensors for shard in shards}
        absent = [
            f"{name} in {file}" for name, file in weight_map.items() if name not in by_file[file]
        ]
        raise SourceError(
            f"{INDEX_FILE} names tensors that are not in the header of their file: {_some(absent)}"
        )
    if unlisted:
        raise SourceError(
            f"{INDEX_FILE} does not place tensors where the files hold them:"
            f" {_some(sorted(unlisted))}"
        )


def _some(names: list[str]) -> str:
    """The first few names, and how many there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _digest(parts: Iterable[bytes]) -> bytes:
    """SHA-256 over the parts with their lengths, so that no two lists of parts look the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
