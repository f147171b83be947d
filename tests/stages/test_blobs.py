"""Blobs: what is stored is what was submitted and says what it is; readers take nothing else;
nothing goes before its successor is durable."""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p48ray.errors import CorruptObjectError, P48Error, ShardCorruptError
from p48ray.run import run_root
from p48ray.run.checked import PART_RECORDS
from p48ray.run.manifest import BoundaryPart
from p48ray.stages import blobs
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import write_boundary
from p48ray.store.local import LocalStore
from p48ray.unit import context as context_module
from p48ray.unit.context import StageContext
from tests.stages.test_capture import open_run

WAIT_S = 20.0


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return open_run(tmp_path / "run")


def values_of(part: int, rows: int = 128) -> Tensor:
    return torch.randn(2, rows // 2, 256, generator=torch.Generator().manual_seed(part))


def leave(
    context: StageContext, number: int = 2, part: int = 1, values_BSH: Tensor | None = None
) -> Tensor:
    """One boundary, stored. Returns its rows."""
    values_BSH = values_of(part) if values_BSH is None else values_BSH
    with BlobWriter(context) as writer:
        write_boundary(writer, "residuals", number, context.plan.parts[part], values_BSH, 0.0)
    return values_BSH.flatten(0, 1)


def key_of(number: int = 2, part: int = 1) -> str:
    return run_root.blob("residuals", number, part)


def path_of(context: StageContext, key: str) -> Path:
    return Path(context.store.uri) / key


def test_manifest_describes_the_file_and_the_values_come_back(context: StageContext) -> None:
    values_TH = leave(context)
    data = context.store.get(key_of())
    manifest = BoundaryPart.load(context.store, run_root.manifest_of(key_of()))
    assert (manifest.size_bytes, manifest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (manifest.kind, manifest.layer, manifest.part, manifest.num_tokens) == (
        "residuals",
        2,
        1,
        128,
    )
    assert torch.equal(context.boundary("residuals", 2, 1), values_TH)


# What readers refuse.


def refused(
    context: StageContext,
    match: str,
    kind: run_root.BlobKind = "residuals",
    number: int = 2,
    part: int = 1,
) -> None:
    with pytest.raises(CorruptObjectError, match=match) as caught:
        context.boundary(kind, number, part)
    assert caught.value.keys == (
        run_root.blob_manifest(kind, number, part),
        run_root.blob(kind, number, part),
    )


@pytest.mark.parametrize("share", [0.0, 0.004, 0.01, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_anywhere_is_refused_before_arrow_sees_it(
    share: float, bit: int, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(context)
    path = path_of(context, key_of())
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1 << bit
    path.write_bytes(data)
    monkeypatch.setattr(
        context_module.arrow, "decode", lambda *_: pytest.fail("parsed before it was checked")
    )
    refused(context, "expected .* bytes with SHA-256 .* as its manifest says")


@pytest.mark.parametrize("length", [0, 1, -1, -64])
def test_a_file_that_was_cut_or_is_empty_is_refused(length: int, context: StageContext) -> None:
    leave(context)
    path = path_of(context, key_of())
    path.write_bytes(path.read_bytes()[:length])
    refused(context, "found .* others")


@pytest.mark.parametrize("gone", [key_of(), run_root.manifest_of(key_of())])
def test_what_is_gone_is_named(gone: str, context: StageContext) -> None:
    leave(context)
    path_of(context, gone).unlink()
    refused(context, "residuals/layer-002/part-0001")


def test_a_manifest_that_is_no_record_is_refused(context: StageContext) -> None:
    leave(context)
    path_of(context, run_root.manifest_of(key_of())).write_text("{}")
    refused(context, "unreadable")


@pytest.mark.parametrize(
    ("number", "part", "kind"),
    [(2, 0, "residuals"), (3, 1, "residuals"), (2, 1, "residual-gradients")],
    ids=["part", "layer", "kind"],
)
def test_another_blob_in_its_place_is_refused_with_and_without_its_manifest(
    number: int, part: int, kind: run_root.BlobKind, context: StageContext
) -> None:
    leave(context)
    with BlobWriter(context) as writer:
        write_boundary(writer, kind, number, context.plan.parts[part], values_of(part), 0.0)
    shutil.copy(
        path_of(context, run_root.blob_manifest(kind, number, part)),
        path_of(context, run_root.manifest_of(key_of())),
    )
    shutil.copy(path_of(context, run_root.blob(kind, number, part)), path_of(context, key_of()))
    refused(context, "(kind|layer|part): expected .*, found ")
    # a manifest edited to fit is not enough: the file says what it is
    record = BoundaryPart.load(context.store, run_root.blob_manifest(kind, number, part))
    edited = record.model_copy(update={"kind": "residuals", "layer": 2, "part": 1})
    context.store.put(run_root.manifest_of(key_of()), edited.to_json())
    refused(context, "expected '.*', found '.*'")


def test_a_blob_of_another_plan_is_refused(context: StageContext) -> None:
    leave(context)
    key = run_root.manifest_of(key_of())
    record = BoundaryPart.load(context.store, key)
    context.store.put(key, record.model_copy(update={"units_digest": "f" * 64}).to_json())
    with pytest.raises(ShardCorruptError, match=r"units_digest: expected .* found 'ffff"):
        context.boundary("residuals", 2, 1)


@pytest.mark.parametrize("kind", ["activations", "gradients"])
def test_a_manifest_of_another_kind_is_no_record_of_this_one(
    kind: run_root.BlobKind, context: StageContext
) -> None:
    leave(context)
    record = context.store.get(run_root.manifest_of(key_of()))
    context.store.put(run_root.blob_manifest(kind, 2, 1), record)
    with pytest.raises(CorruptObjectError, match=f"not a {PART_RECORDS[kind].__name__}"):
        context.blob(kind, 2, 1)


def test_tokens_of_another_owner_or_with_a_wrong_byte_are_refused(context: StageContext) -> None:
    with pytest.raises(ShardCorruptError, match="owner: expected 'other', found"):
        context.tokens(run_root.TOKENS, "other")
    path = path_of(context, run_root.TOKENS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObjectError) as caught:
        context.tokens(run_root.TOKENS, context.plan.units_digest)
    assert caught.value.keys == (run_root.manifest_of(run_root.TOKENS), run_root.TOKENS)


@pytest.mark.parametrize("data", [None, b"{}"], ids=["gone", "unreadable"])
def test_tokens_whose_manifest_is_no_record_are_packed_again(
    data: bytes | None, context: StageContext
) -> None:
    path = path_of(context, run_root.manifest_of(run_root.TOKENS))
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(CorruptObjectError) as caught:
        context.tokens(run_root.TOKENS, context.plan.units_digest)
    assert caught.value.keys == (run_root.manifest_of(run_root.TOKENS), run_root.TOKENS)


# Hashed once.


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what readers hash, in order."""
    found: list[int] = []
    real = hashlib.sha256

    class Module:
        @staticmethod
        def sha256(data: Any = b"") -> Any:
            if len(data):
                found.append(len(data))
            return real(data)

    monkeypatch.setattr(context_module, "hashlib", Module)
    return found


def test_whoever_wrote_a_file_does_not_hash_it_again_and_another_process_does_once(
    context: StageContext, hashed: list[int], tmp_path: Path
) -> None:
    leave(context)
    context.boundary("residuals", 2, 1)
    assert hashed == []
    other = open_run(tmp_path / "run")
    for _ in range(3):
        other.boundary("residuals", 2, 1)
    assert hashed == [os.path.getsize(path_of(context, key_of()))]


def test_a_file_that_was_written_to_is_hashed_again(
    context: StageContext, hashed: list[int]
) -> None:
    leave(context)
    path = path_of(context, key_of())
    path.write_bytes(path.read_bytes())
    context.boundary("residuals", 2, 1)
    assert len(hashed) == 1
    os.replace(shutil.copy(path, path.with_suffix(".copy")), path)
    context.boundary("residuals", 2, 1)
    assert len(hashed) == 2


# Writers beside the computation.


class SlowStore(LocalStore):
    """Writes of keys with `held` in them wait until they are let go."""

    def __init__(self, root: str, held: str) -> None:
        super().__init__(root)
        self.held, self.go, self.waiting = held, threading.Event(), threading.Event()

    def write_once(self, key: str, buffers: Any) -> Any:
        if self.held in key:
            self.waiting.set()
            assert self.go.wait(WAIT_S)
        return super().write_once(key, buffers)


@pytest.fixture
def slow(context: StageContext) -> Iterator[tuple[StageContext, SlowStore]]:
    store = SlowStore(context.store.uri, "layer-003")
    object.__setattr__(context, "store", store)
    yield context, store
    store.go.set()


def test_a_replaced_boundary_goes_only_once_what_replaces_it_is_durable(
    slow: tuple[StageContext, SlowStore],
) -> None:
    context, store = slow
    leave(context)
    with BlobWriter(context) as writer:
        write_boundary(writer, "residuals", 3, context.plan.parts[1], values_of(3), 0.0)
        writer.delete_after(1, [run_root.manifest_of(key_of()), key_of()])
        assert store.waiting.wait(WAIT_S)
        writer.delete_replaced()
        assert store.head(key_of()) is not None
        store.go.set()
    assert store.head(key_of()) is None and store.head(run_root.manifest_of(key_of())) is None
    assert store.head(run_root.blob("residuals", 3, 1)) is not None


def test_nothing_is_deleted_after_a_write_that_failed_and_its_error_is_told(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(context)
    real = LocalStore.write_once

    def full(self: LocalStore, key: str, buffers: Any) -> Any:
        if "layer-003" in key:
            raise P48Error(f"{key}: No space left on device (ENOSPC)")
        return real(self, key, buffers)

    monkeypatch.setattr(LocalStore, "write_once", full)
    with (
        pytest.raises(P48Error, match=r"layer-003/part-0001\.arrow: No space left"),
        BlobWriter(context) as writer,
    ):
        write_boundary(writer, "residuals", 3, context.plan.parts[1], values_of(3), 0.0)
        writer.delete_after(1, [key_of()])
        while True:  # the stream goes on until it submits once the error is known
            write_boundary(writer, "residuals", 4, context.plan.parts[1], values_of(4), 0.0)
    assert context.store.head(key_of()) is not None
    assert context.store.head(run_root.blob_manifest("residuals", 3, 1)) is None
    assert not list(Path(context.store.uri).rglob(".p48tmp-*"))


def test_a_stream_waits_for_room_behind_it(
    slow: tuple[StageContext, SlowStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, store = slow
    monkeypatch.setattr(blobs, "BEHIND_BYTES", values_of(0).nbytes)
    passed = threading.Event()

    def stream() -> None:
        with BlobWriter(context) as writer:
            for number in (3, 4):
                write_boundary(
                    writer, "residuals", number, context.plan.parts[1], values_of(number), 0.0
                )
            passed.set()

    thread = threading.Thread(target=stream, daemon=True)
    thread.start()
    assert store.waiting.wait(WAIT_S)
    assert not passed.wait(0.3), "the second blob has no room"
    store.go.set()
    assert passed.wait(WAIT_S)
    thread.join(WAIT_S)
    assert store.head(run_root.blob("residuals", 4, 1)) is not None


def test_a_blob_larger_than_the_bound_goes_alone(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "BEHIND_BYTES", 10)
    for number in (2, 3):
        leave(context, number)
    assert context.boundary("residuals", 3, 1).shape == (128, 256)


# Others' leftovers.


def test_a_manifest_whose_blob_is_gone_is_replaced(context: StageContext) -> None:
    leave(context, values_BSH=values_of(7))
    path_of(context, key_of()).unlink()
    values_TH = leave(context)
    assert torch.equal(context.boundary("residuals", 2, 1), values_TH)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_blob_without_a_manifest_counts_if_it_is_what_this_one_is(
    is_same: bool, context: StageContext
) -> None:
    """Its writer died in between. Anything else has no claim to be this part."""
    leave(context, values_BSH=values_of(1 if is_same else 7))
    path_of(context, run_root.manifest_of(key_of())).unlink()
    written_at = os.stat(path_of(context, key_of())).st_mtime_ns
    values_TH = leave(context)
    assert torch.equal(context.boundary("residuals", 2, 1), values_TH)
    assert (os.stat(path_of(context, key_of())).st_mtime_ns == written_at) == is_same


def test_a_blob_that_is_complete_is_never_touched(context: StageContext) -> None:
    """Another driver's, of another device model perhaps: units may have read it already."""
    theirs_TH = leave(context, values_BSH=values_of(7))
    facts = os.stat(path_of(context, key_of()))
    leave(context)
    assert os.stat(path_of(context, key_of())) == facts
    assert torch.equal(context.boundary("residuals", 2, 1), theirs_TH)


def test_an_error_of_the_computation_loses_nothing_that_was_submitted(
    slow: tuple[StageContext, SlowStore],
) -> None:
    """More than there are writers: whoever resumes starts from the last of them."""
    context, store = slow
    threading.Timer(0.3, store.go.set).start()
    with pytest.raises(ZeroDivisionError), BlobWriter(context) as writer:
        for part in range(3):
            for kind in ("residuals", "compressed-residuals", "residual-gradients"):
                write_boundary(writer, kind, 3, context.plan.parts[part], values_of(part), 0.0)  # type: ignore[arg-type]
        raise ZeroDivisionError
    manifests = {
        info.key
        for info in context.store.list()
        if "layer-003" in info.key and info.key.endswith(".json")
    }
    assert len(manifests) == 3 * 3
