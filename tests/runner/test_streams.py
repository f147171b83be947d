"""Back-pressure: whatever a run root holds, and however few workers there are, every unit is done,
and streams never get further ahead of units than they may."""

import random
from collections.abc import Iterable

import pytest

from p48ray.run import run_root
from p48ray.run.needs import read_needs
from p48ray.run.run_root import BlobKind
from p48ray.runner.overlap import Overlap
from p48ray.runner.streams import Streams, share_out_parts
from p48ray.stages.prepare import Prepared
from p48ray.stages.tasks import Task
from tests.conftest import REPO
from tests.run.test_needs import climb, follow
from tests.runner.test_overlap import leave, make

LAYERS = (1, 2, 3, 4)
SETTINGS = {
    "calibration.num_sequences": "4",
    "calibration.sequences_per_part": "1",
    "run.num_workers": "3",
}
DRAWS = 25


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def planned(every: int, limit: int) -> Prepared:
    own = {"run.boundary_every": str(every), "run.layers_in_flight": str(limit)}
    return make("units", **SETTINGS, **own)


class Crew:
    """Some workers whose tasks end in any order; what they leave are stubs.

    Args:
        prepared: the run.
        size: how many there are.
        chance: of orders.
        broken: ids of tasks that fail for good.
    """

    def __init__(
        self, prepared: Prepared, size: int, chance: random.Random, broken: Iterable[str] = ()
    ) -> None:
        self.prepared, self.plan, self.store = prepared, prepared.plan, prepared.store
        self.size, self.chance, self.broken = size, chance, set(broken)
        self.held: list[int] = []  # layers whose tokens lie there, after each task

    def run(self) -> None:
        work = Overlap(
            self.prepared.context, read_needs(self.plan, self.store), lambda: float("inf")
        )
        waiting: list[Task] = []
        running: list[Task] = []
        while True:
            waiting += work.next(not waiting and not running)
            if not waiting and not running:
                return
            self.chance.shuffle(waiting)
            waiting.sort(key=lambda task: task.layer is not None)  # as Dispatcher does
            while waiting and len(running) < self.size:
                running.append(waiting.pop(0))
            task = running.pop(self.chance.randrange(len(running)))
            if task.id in self.broken:
                continue
            self.work(task)
            work.done(task)
            self.held.append(len(self.layers_with_tokens()))

    def layers_with_tokens(self) -> set[int]:
        return {
            int(info.key.split("/")[1].removeprefix("layer-"))
            for prefix in (run_root.ACTIVATIONS, run_root.GRADIENTS)
            for info in self.store.list(prefix)
            if info.key.endswith(".arrow")
        }

    def work(self, task: Task) -> None:
        needs = read_needs(self.plan, self.store)
        if task.stage == "compress":
            assert needs.is_complete(task.item.layer), "a unit without its tokens"
            self.store.put(task.marker or "", b"{}")
        elif task.stage == "capture":
            for p in task.item:
                found = climb(self.plan, needs.keys, p, needs.forward_layers(p))
                assert found is not None
                self.leave_boundaries(p, found - needs.keys)
        else:
            number, parts = task.item
            for p in parts:
                visits = [v for v in needs.visits(p) if number in v.segment]
                found = follow(self.plan, needs.keys, p, visits)
                assert found is not None, "a segment without its boundary"
                for visit in visits:
                    for n in visit.seen:
                        leave(self.prepared, n, self.plan.parts[p], way="up")
                    for n in visit.felt:
                        leave(self.prepared, n, self.plan.parts[p], way="back")
                self.leave_boundaries(p, found - needs.keys)

    def leave_boundaries(self, part: int, keys: Iterable[str]) -> None:
        for key in keys:
            if key.startswith((run_root.RESIDUALS, run_root.RESIDUAL_GRADIENTS)):
                self.store.put(key, b"-")


def fill(prepared: Prepared, chance: random.Random) -> None:
    """Any objects that a run may have left; every kind is rare in some draws and frequent in
    others."""
    store, parts = prepared.store, prepared.plan.parts
    for n in LAYERS:
        leave(prepared, n)
    kinds: tuple[BlobKind, ...] = ("residuals", "residual-gradients")
    for kind in kinds:
        for n in LAYERS:
            for p in parts:
                for name in (run_root.blob, run_root.blob_manifest):
                    store.put(name(kind, n, p.part), b"-")
    for unit in prepared.plan.units:
        store.put(run_root.unit_manifest(unit.id), b"{}")
    share = {
        kind: chance.choice((0.0, 0.2, 0.6, 0.9, 1.0))
        for kind in ("activations", "gradients", "residuals", "residual-gradients", "units")
    }
    for info in list(store.list()):
        if chance.random() >= share[info.key.split("/")[0]]:
            store.delete(info.key)


def missing(prepared: Prepared) -> set[str]:
    return {u.id for u in read_needs(prepared.plan, prepared.store).missing_units}


def forbid_being_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has failed: a segment that is begun only because nothing else is left to do would have
    been a deadlock."""
    real = Streams.take

    def take(self: Streams, *args: object, is_stuck: bool = False) -> list[Task]:
        found = real(self, *args)  # type: ignore[arg-type]
        assert found or not is_stuck or not self.waiting
        return found

    monkeypatch.setattr(Streams, "take", take)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("every", "limit"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (5, 1)])
def test_resumed_run_does_every_unit_whatever_it_finds(
    every: int, limit: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_being_stuck(monkeypatch)
    chance, prepared = random.Random(every * 100 + limit * 10 + workers), planned(every, limit)
    for _ in range(DRAWS):
        fill(prepared, chance)
        Crew(prepared, workers, chance).run()
        assert missing(prepared) == set()
        assert list(prepared.store.list(run_root.RESIDUALS)) == []


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("every", "limit"), [(1, 1), (1, 2), (2, 1), (3, 1), (9, 1)])
def test_streams_never_have_more_layers_ahead_than_a_segment_and_those_in_flight(
    every: int, limit: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_being_stuck(monkeypatch)
    chance = random.Random(3)
    most = 0
    for _ in range(5):
        crew = Crew(planned(every, limit), workers, chance)
        crew.run()
        assert missing(crew.prepared) == set()
        most = max(most, *crew.held)
    longest = max(sum(n in s for n in LAYERS) for s in crew.plan.passes.segments)
    assert longest <= most <= limit - 1 + longest


@pytest.mark.parametrize("workers", [1, 3])
def test_units_that_fail_for_good_hold_up_nothing_but_themselves(workers: int) -> None:
    """More layers than may be in flight never get done."""
    chance = random.Random(4)
    for _ in range(DRAWS):
        prepared = planned(1, chance.choice((1, 2)))
        units = [u.id for u in prepared.plan.units]
        broken = {next(u for u in units if u.startswith(f"L{n:03d}")) for n in (4, 3, 2)}
        broken |= set(chance.sample(units, 3))
        Crew(prepared, workers, chance, broken).run()
        assert missing(prepared) == broken


def test_stream_that_fails_for_good_lets_no_other_get_further_ahead() -> None:
    prepared = planned(1, 2)
    (failing,) = [
        task.id
        for tasks in Streams(
            prepared.plan, read_needs(prepared.plan, prepared.store)
        ).following.values()
        for task in tasks
        if task.item == (4, [0, 3])
    ]
    crew = Crew(prepared, 2, random.Random(5), [failing])
    crew.run()
    assert crew.layers_with_tokens() == {3, 4}
    assert missing(prepared) == {u.id for u in prepared.plan.units}


def test_layer_whose_units_another_driver_did_holds_nothing_up() -> None:
    prepared = planned(1, 1)
    work = Overlap(
        prepared.context, read_needs(prepared.plan, prepared.store), lambda: float("inf")
    )
    for up in work.next(False):
        work.done(up)
    backs = work.next(False)
    assert {task.item[0] for task in backs} == {4}
    leave(prepared, 4)
    for unit in prepared.plan.units:
        if unit.layer == 4:
            prepared.store.put(run_root.unit_manifest(unit.id), b"{}")
    for back in backs:
        work.done(back)
    assert {task.item[0] for task in work.next(False)} == {3}


@pytest.mark.parametrize(("workers", "capture", "slices"), [(3, 2, 2), (2, 3, 2), (9, 9, 4)])
def test_parts_are_shared_by_workers_that_there_are(
    workers: int, capture: int, slices: int
) -> None:
    """More slices than workers would each read the source once more."""
    own = {"run.num_workers": str(workers), "run.capture_workers": str(capture)}
    plan = make("units", **SETTINGS | own).plan
    shared = share_out_parts(plan, [0, 1, 2, 3])
    assert len(shared) == slices and sorted(part for own in shared for part in own) == [0, 1, 2, 3]
