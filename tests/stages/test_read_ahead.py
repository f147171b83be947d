"""Verification with threads ahead of it: findings keep their order, an error comes in its turn, and
nothing reads on behind it. On CUDA they are the same."""

import hashlib
import random
import shutil
import threading
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from p48ray.checkpoint.finite_values import FiniteCheck
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.errors import ShardCorruptError
from p48ray.finished.verifier import verify_folder
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import WorkUnit
from p48ray.stages import read_ahead
from p48ray.stages.linear_proof import Promise
from p48ray.stages.read_ahead import compare_bytes, readers, tensor_digest
from p48ray.stages.shard_proof import verify_shard
from p48ray.store import LocalStore, MemoryStore, Store
from tests.stages.damage import Folder
from tests.stages.small_run import SmallRun


@pytest.fixture(autouse=True, params=["threads", "inline"])
def small_shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small run's shards are looked at in threads as large ones are, and inline."""
    monkeypatch.setattr(read_ahead, "INLINE_BYTES", 0 if request.param == "threads" else 2**30)


@pytest.fixture(scope="module")
def clean(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


def findings(
    run: SmallRun,
    store: Store,
    shard: OutputShard,
    device: str = "cpu",
    source: CheckpointIndex | None = None,
) -> list[str]:
    """Of one shard of the finished run, by its units' manifests."""
    units = [s for s in shard.segments if isinstance(s, WorkUnit)]
    manifests = [
        UnitManifest.load(run.prepared.store, run_root.unit_manifest(unit.id)) for unit in units
    ]
    errors = {
        record.name: record.relative_weight_error
        for manifest in manifests
        for record in manifest.linears
    }
    promise = Promise(
        is_sparse=True,
        scale_span=32,
        weight_errors=errors,
        unit_sha256={m.unit: m.sha256 for m in manifests},
    )
    context = run.context
    return verify_shard(
        store, source or context.source, context.layout, shard, promise, torch.device(device)
    ).problems


def damaged(run: SmallRun, clean: Folder) -> tuple[Folder, OutputShard, list[str]]:
    """The shard with the most untouched tensors among those with a unit, damaged in every segment.
    Returns: what each finding must begin with, in order."""
    shard = max(
        (
            s
            for s in run.prepared.shards
            if any(isinstance(segment, WorkUnit) for segment in s.segments)
        ),
        key=lambda s: len(s.segments),
    )
    folder, expected = clean, []
    for segment in shard.segments:
        if not isinstance(segment, WorkUnit):
            folder = folder.flipped(segment.name, 1, 4)
            expected.append(f"{shard.name}: {segment.name}: bytes differ")
            continue
        expected.append(f"{shard.name}: unit {segment.id}: expected the bytes with SHA-256")
        for expert in segment.experts:
            gate, up, down = (
                run.context.layout.expert_linear_name(segment.layer, expert, p)
                for p in ("gate_proj", "up_proj", "down_proj")
            )
            folder = folder.with_bytes(f"{gate}.weight_packed", 0, b"\x11\x11\x11\x00")
            folder = folder.with_bytes(f"{up}.input_global_scale", 0, b"\x00\x00\xc0\x7f")
            folder = folder.with_bytes(f"{down}.weight_scale", 0, b"\x7f\x38")
            expected.append(f"{gate}.weight_packed: 1 groups of 8 inputs keep more")
            expected.append(f"{up}.input_global_scale: expected finite and above 0, found nan")
            expected += [
                f"{down}.weight_scale: expected finite and above 0",
                f"{down}.weight_scale: expected the two scales",
            ]
            expected.append(f"{up}.input_global_scale: expected gate's")
    return folder, shard, expected


class SlowStore(MemoryStore):
    """Every read takes its own time, so that threads end in any order."""

    source = random.Random(0)

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        time.sleep(self.source.random() * 0.004)
        return super().get_range(key, start, num_bytes)


def in_slow_store(folder: Folder, seed: int) -> SlowStore:
    store = SlowStore(uuid.uuid4().hex)
    store.source = random.Random(seed)
    for name, data in folder.files.items():
        store.put(name, data)
    return store


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [1000, read_ahead.COMPARE_CHUNK_BYTES])
def test_damage_in_every_segment_is_found_in_the_order_of_the_shard(
    finished: SmallRun, clean: Folder, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(read_ahead, "COMPARE_CHUNK_BYTES", chunk_bytes)
    folder, shard, expected = damaged(finished, clean)
    assert len(shard.segments) > 5
    found = [findings(finished, in_slow_store(folder, seed), shard) for seed in range(2)]
    assert found[0] == found[1]
    assert len(found[0]) == len(expected)
    assert all(text.startswith(words) for text, words in zip(found[0], expected, strict=True)), (
        found[0]
    )


def test_damage_is_found_in_the_same_order_without_the_source(
    finished: SmallRun, clean: Folder
) -> None:
    folder, _, expected = damaged(finished, clean)
    found = [verify_folder(in_slow_store(folder, seed), None).problems for seed in range(2)]
    assert found[0] == found[1]
    units = [text for text in expected if "bytes differ" not in text]
    assert [text[: len(words)] for text, words in zip(found[0], units, strict=False)] == units
    assert len(found[0]) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_source", [False, True])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_file_that_is_cut_while_it_is_read_is_an_error_that_names_it(
    finished: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_source: bool, after: int
) -> None:
    """A file in a folder, cut behind its header after so many reads of data. Nobody maps it, so
    there is no SIGBUS, and no thread reads on."""
    shutil.copytree(finished.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(finished.source, tmp_path / "source")
    _, shard, _ = damaged(finished, Folder.read(finished.checkpoint))
    source = replace(finished.context.source, store=LocalStore(tmp_path / "source"))
    unit = next(s for s in shard.segments if isinstance(s, WorkUnit))
    expert = finished.context.layout.expert_tensor_names(unit.layer, unit.first_expert)[0]
    cut = (
        tmp_path / "source" / source.tensors[expert].file
        if is_source
        else tmp_path / "checkpoint" / shard.name
    )
    reads, lock = [0], threading.Lock()
    real_range, real_into = LocalStore.get_range, LocalStore.read_into

    def count(start: int) -> None:
        with lock:
            reads[0] += start > 8
            if reads[0] > after + 1:  # of the header's JSON, too
                with cut.open("r+b") as file:
                    file.truncate(4096)

    def get_range(store: LocalStore, key: str, start: int, num_bytes: int) -> bytes:
        count(start)
        return real_range(store, key, start, num_bytes)

    def read_into(store: LocalStore, key: str, start: int, target: memoryview) -> None:
        count(start)
        real_into(store, key, start, target)

    monkeypatch.setattr(LocalStore, "get_range", get_range)
    monkeypatch.setattr(LocalStore, "read_into", read_into)
    with pytest.raises(
        ShardCorruptError, match=rf"{cut.name}: asked for .* found 4096 bytes in the object"
    ):
        findings(finished, LocalStore(tmp_path / "checkpoint"), shard, source=source)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("verify")]


def test_chunks_of_both_sides_are_compared_and_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "COMPARE_CHUNK_BYTES", 100)
    store, data = MemoryStore(uuid.uuid4().hex), random.Random(3).randbytes(1050)
    for size in (0, 1, 99, 100, 101, 200, 1050):
        store.put("a", data[:size])
        entry = TensorEntry("a", "U8", (size,), "a", 0, size)
        with readers(1000) as threads:
            digest = hashlib.sha256(data[:size]).hexdigest()
            values = FiniteCheck("U8", (size,))
            compare = partial(
                compare_bytes, store, entry, store, reads=threads.reads, values=values
            )
            assert tensor_digest(store, entry, threads.reads, values) == digest
            assert compare(entry) == (True, digest)
            for at in {0, size // 2, size - 1} if size else set():
                store.put("b", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 : size])
                other = replace(entry, name="b", file="b")
                assert compare(other) == (False, digest)
            store.put("c", data[:size] + b"1")
            longer = TensorEntry("c", "U8", (size + 1,), "c", 0, size + 1)
            assert compare(longer) == (False, digest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_findings_on_cuda_are_those_of_the_cpu(finished: SmallRun, clean: Folder) -> None:
    """Clean, damaged everywhere, and damaged where only the error against the source tells."""
    folder, shard, expected = damaged(finished, clean)
    for other in finished.prepared.shards:
        assert findings(finished, clean.store(), other, "cuda") == []
    found = [findings(finished, folder.store(), shard, device) for device in ("cpu", "cuda")]
    assert found[0] == found[1]
    assert len(found[1]) == len(expected)
    unit = next(s for s in shard.segments if isinstance(s, WorkUnit))
    gate = finished.context.layout.expert_linear_name(unit.layer, unit.first_expert, "gate_proj")
    zeroed = clean.with_bytes(f"{gate}.weight_packed", 0, bytes(256))
    found = [findings(finished, zeroed.store(), shard, device) for device in ("cpu", "cuda")]
    assert found[0] == found[1]
    assert f"{gate}: relative weight error" in found[1][1]
