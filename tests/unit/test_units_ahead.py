"""Units that share a process: what one reads and writes beside what another computes. Reads,
computations and writes wait for each other by events."""

import hashlib
import math
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from p48ray.errors import TransientStoreError
from p48ray.run import run_root
from p48ray.run.manifest import Failure, UnitManifest
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.stages import workplace
from p48ray.stages.tasks import Task, TaskResult
from p48ray.stages.workplace import Workplace
from p48ray.store.base import Buffers, Written
from p48ray.store.local import LocalStore
from p48ray.unit import compress, compute_lock, routed_tokens
from p48ray.unit.compress import Clock, Fetched, Solved
from p48ray.unit.context import StageContext
from tests.stages.small_run import SmallRun

pytestmark = pytest.mark.slow

WAIT_S = 60.0

Hook = Callable[[str], None]


def nothing(what: str) -> None:
    """No hook."""


class WatchedStore(LocalStore):
    """Calls `on_read` after each part was mapped and `on_write` before each write, in the thread
    that asks for it."""

    on_read: Hook = staticmethod(nothing)
    on_write: Hook = staticmethod(nothing)

    def put(self, key: str, data: bytes) -> None:
        self.on_write(key)
        super().put(key, data)

    def write_once(self, key: str, buffers: Buffers) -> Written:
        self.on_write(key)
        return super().write_once(key, buffers)


@dataclass
class Shop:
    """A workplace whose store and computations are watched. `computing`: units in the middle of it;
    `on_compute` is called with each, before it begins."""

    workplace: Workplace
    store: WatchedStore
    first: WorkUnit
    second: WorkUnit
    on_compute: Hook = nothing
    computing: list[str] = field(default_factory=list)
    tokens: dict[str, "weakref.ref[routed_tokens.RoutedTokens]"] = field(default_factory=dict)

    def run(self, *units: WorkUnit) -> list["Future[TaskResult]"]:
        """Each in a thread of its own; the next one begins when the one before has begun to
        compute."""
        pool, futures = ThreadPoolExecutor(len(units)), []
        begun = {unit.id: threading.Event() for unit in units}
        hook = self.on_compute

        def on_compute(unit: str) -> None:
            begun[unit].set()
            hook(unit)

        self.on_compute = on_compute
        for unit in units:
            futures.append(
                pool.submit(self.workplace.execute, Task(stage="compress", id=unit.id, item=unit))
            )
            assert unit is units[-1] or begun[unit.id].wait(WAIT_S)
        pool.shutdown(wait=True)
        return futures

    def shard_digest(self, unit: WorkUnit) -> str:
        manifest = UnitManifest.load(self.store, run_root.unit_manifest(unit.id))
        return hashlib.sha256(
            self.store.get(run_root.unit_shard(unit.id, manifest.attempt))
        ).hexdigest()


@pytest.fixture
def shop(finished: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """The finished run without its units; `first` and `second` belong to different layers, so that
    keys tell whose they are."""
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    shutil.rmtree(root / "units")
    store = WatchedStore(root)
    monkeypatch.setattr(workplace, "open_run_root", lambda plan, uri: store)
    plan: RunPlan = finished.prepared.plan
    first, second = (next(u for u in plan.units if u.layer == layer) for layer in (1, 2))
    shop = Shop(Workplace(plan, str(root)), store, first, second)
    checked = StageContext.checked

    def watched_checked(self: StageContext, key: str, *rest: Any) -> bytes | memoryview:
        data = checked(self, key, *rest)
        store.on_read(key)
        return data

    monkeypatch.setattr(StageContext, "checked", watched_checked)
    solve = compress.solve_unit

    def watched(context: StageContext, unit: WorkUnit, fetched: Fetched, clock: Clock) -> Solved:
        shop.computing.append(unit.id)
        assert shop.computing == [unit.id]
        shop.tokens[unit.id] = weakref.ref(fetched.tokens)
        try:
            shop.on_compute(unit.id)
            return solve(context, unit, fetched, clock)
        finally:
            shop.computing.remove(unit.id)

    monkeypatch.setattr(compress, "solve_unit", watched)
    return shop


def last_part(shop: Shop, unit: WorkUnit) -> str:
    return run_root.activation_part(unit.layer, shop.workplace.plan.parts[-1].part)


def test_next_unit_is_read_while_one_computes_and_one_is_written_while_the_next_computes(
    shop: Shop, finished: SmallRun
) -> None:
    is_read, computes = threading.Event(), threading.Event()
    order: list[str] = []

    def on_read(key: str) -> None:
        if key == last_part(shop, shop.second):
            is_read.set()

    def on_compute(unit: str) -> None:
        order.append(f"computes {unit}")
        if unit == shop.first.id:
            assert is_read.wait(WAIT_S)  # all that the second needs, while the first has its turn
        else:
            computes.set()

    def on_write(key: str) -> None:
        if key.startswith(f"units/{shop.first.id}/"):
            assert computes.wait(WAIT_S)  # the second computes before the first is written
            assert shop.store.head(run_root.unit_manifest(shop.first.id)) is None
        order.append(f"writes {key.split('/')[1]}")

    shop.on_compute, shop.store.on_read, shop.store.on_write = on_compute, on_read, on_write
    results = [f.result() for f in shop.run(shop.first, shop.second)]
    assert [(r.error_type, r.error) for r in results] == [(None, "")] * 2
    assert order[:2] == [f"computes {shop.first.id}", f"computes {shop.second.id}"]
    assert sorted(order[2:]) == [f"writes {shop.first.id}", f"writes {shop.second.id}"]
    for unit in (shop.first, shop.second):
        manifest = UnitManifest.load(finished.context.store, run_root.unit_manifest(unit.id))
        assert shop.shard_digest(unit) == manifest.sha256


def test_units_of_one_process_compute_one_at_a_time(shop: Shop) -> None:
    """The fixture's computation refuses to begin while another is under way; the first one's lasts
    until the others have read all they need."""
    reads = threading.Semaphore(0)
    others = [u for u in shop.workplace.plan.units if u.layer != shop.first.layer][:3]
    shop.store.on_read = lambda key: (
        reads.release() if key in {last_part(shop, u) for u in others} else None
    )

    def on_compute(unit: str) -> None:
        if unit == shop.first.id:
            for other in others:
                futures.append(
                    pool.submit(
                        shop.workplace.execute, Task(stage="compress", id=other.id, item=other)
                    )
                )
            for _ in others:
                assert reads.acquire(timeout=WAIT_S)

    futures: list[Future[TaskResult]] = []
    shop.on_compute = on_compute
    with ThreadPoolExecutor(len(others)) as pool:
        result = shop.workplace.execute(Task(stage="compress", id=shop.first.id, item=shop.first))
        assert [r.error for r in (result, *(f.result() for f in futures))] == [""] * 4


def test_tokens_are_let_go_before_the_shard_is_written(shop: Shop) -> None:
    held: list[object] = []
    shop.store.on_write = lambda key: held.append(shop.tokens[key.split("/")[1]]())
    (result,) = (f.result() for f in shop.run(shop.first))
    assert result.is_done
    assert held == [None]


def test_error_of_a_unit_read_ahead_is_its_own_and_the_one_that_computes_goes_on(
    shop: Shop,
) -> None:
    Path(shop.store.path(last_part(shop, shop.second))).unlink()
    failed = threading.Event()
    shop.store.on_write = lambda key: failed.set() if key.startswith(run_root.FAILURES) else None
    shop.on_compute = lambda unit: None if failed.wait(WAIT_S) else pytest.fail("nobody found out")
    first, second = (f.result() for f in shop.run(shop.first, shop.second))
    assert first.is_done
    assert (second.task.id, second.error_type) == (shop.second.id, "CorruptObjectError")
    assert last_part(shop, shop.second) in second.redo
    (key,) = (info.key for info in shop.store.list(run_root.FAILURES))
    record = Failure.from_json(shop.store.get(key), key)
    assert (record.stage, record.task) == ("compress", shop.second.id)
    assert "fetch_unit" in record.traceback


def test_failed_write_is_the_failure_of_its_unit_alone(shop: Shop) -> None:
    computes = threading.Event()

    def on_write(key: str) -> None:
        if key.startswith(f"units/{shop.first.id}/"):
            assert computes.wait(WAIT_S)
            raise TransientStoreError(f"{key}: the store did not answer")

    shop.on_compute = lambda unit: computes.set() if unit == shop.second.id else None
    shop.store.on_write = on_write
    first, second = (f.result() for f in shop.run(shop.first, shop.second))
    assert second.is_done
    assert first.is_transient and first.task.id == shop.first.id
    assert shop.store.head(run_root.unit_manifest(shop.first.id)) is None
    shop.store.on_write = nothing
    assert shop.workplace.execute(first.task).is_done


def test_turn_passes_on_after_an_error_and_says_since_when_nothing_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compute_lock.time, "perf_counter", iter((3.0, 8.0)).__next__)
    lock = compute_lock.ComputeLock()
    with lock.held() as free_since:
        assert free_since == -math.inf
    with pytest.raises(KeyError), lock.held() as free_since:
        assert free_since == 3.0
        raise KeyError("a bug")
    with lock.held() as free_since:
        assert free_since == 8.0
        monkeypatch.setattr(compute_lock.time, "perf_counter", lambda: 9.0)


@pytest.mark.parametrize(
    ("free_since", "expected"),
    [(-math.inf, 4.0), (9.0, 4.0), (10.0, 4.0), (11.5, 2.5), (14.0, 0.0), (20.0, 0.0)],
    ids=[
        "nothing before",
        "long ago",
        "as it began",
        "in the middle",
        "as it ended",
        "computes still",
    ],
)
def test_fetch_counts_only_while_nothing_computes(free_since: float, expected: float) -> None:
    assert compute_lock.idle_seconds(10.0, 14.0, free_since) == expected


@pytest.mark.parametrize(("ahead", "num_spills"), [(0, 0), (1, 1)])
def test_units_of_a_worker_share_the_memory_for_tokens(
    ahead: int, num_spills: int, finished: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"prefetch_units": ahead})
    plan = plan.model_copy(update={"config": plan.config.model_copy(update={"run": run})})
    context, unit = workplace.open_context(plan, finished.prepared.store), plan.units[0]
    scales = context.layer_scales(unit.layer)
    num_tokens = sum(scales.tokens_per_expert[e] for e in unit.experts)
    monkeypatch.setattr(
        routed_tokens,
        "GATHERED_BYTES",
        num_tokens * routed_tokens.routed_token_bytes(context.layout.hidden_size, plan.config),
    )
    spills: list[int] = []
    reserve = routed_tokens.reserve_spill
    monkeypatch.setattr(
        routed_tokens,
        "reserve_spill",
        lambda num_bytes, *rest: spills.append(num_bytes) or reserve(num_bytes, *rest),
    )
    routed_tokens.RoutedTokens(context, unit, scales)
    assert len(spills) == num_spills
