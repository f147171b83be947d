"""The module `ray` as RayRunner sees it, in virtual time: nodes that come and go, workers on them,
tasks that take as long as somebody says.

A queue of events with a clock. `ray.wait` lets time pass; a node's loss reaches the caller as Ray's
own RayActorError. See bench/fleet.py.
"""

import math
import pickle
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any, Protocol

from ray.exceptions import RayActorError

from p48ray.stages.tasks import Task, TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machines of one simulation. `bandwidth` is a node's link, in bytes a second; `scratch`
    the disk of its only node, where it has one; `loss_rate` is per hour of a GPU or of a node
    (`loss_per`)."""

    gpus: int
    gpus_per_node: int = 8
    loss_rate: float = 0.0
    loss_per: str = "gpu"
    reads: str = "shared"
    bandwidth: float = 2.5e9
    scratch: float | None = None
    hash_rate: float = 1.5e9
    layers_held: int = 2
    replace_s: float = 300.0
    boot_s: float = 240.0
    start_s: float = 30.0
    detect_s: float = 15.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scratch is not None and (self.max_nodes > 1 or self.loss_rate):
            raise ValueError(
                f"a node's own scratch serves one node that is not lost: found {self.max_nodes}"
                f" nodes, {self.loss_rate:g} losses an hour"
            )

    @property
    def node_gpus(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def max_nodes(self) -> int:
        return math.ceil(self.gpus / self.node_gpus)

    @property
    def losses_per_s(self) -> float:
        """Of one node."""
        return self.loss_rate * (self.node_gpus if self.loss_per == "gpu" else 1) / 3600


@dataclass(slots=True)
class Tally:
    """What a simulation adds up."""

    bytes_read: float = 0.0
    bytes_written: float = 0.0
    layer_loads: int = 0
    joined: set[tuple[str, int]] = field(default_factory=set)
    busy_s: float = 0.0  # GPUs computing, lost attempts included
    nodes_lost: int = 0
    attempts: Counter[str] = field(default_factory=Counter)  # units begun
    parts_repeated: int = 0


@dataclass(eq=False, slots=True)
class Node:
    """A machine. Its link is free for another read from `link_free` on, its disk from `disk_free`;
    `layers`: when those it holds are (or will be) there."""

    id: str
    free: int
    paid_from: float
    is_up: bool = False
    lost_at: float | None = None
    link_free: float = 0.0
    disk_free: float = 0.0
    layers: OrderedDict[int, float] = field(default_factory=OrderedDict)
    actors: list["Actor"] = field(default_factory=list)

    def read(self, now: float, num_bytes: float, bandwidth: float) -> float:
        """When a read asked for now is through."""
        self.link_free = max(now, self.link_free) + num_bytes / bandwidth
        return self.link_free

    def read_disk(self, now: float, num_bytes: float, bandwidth: float) -> float:
        """The same, of its disk."""
        self.disk_free = max(now, self.disk_free) + num_bytes / bandwidth
        return self.disk_free


@dataclass(eq=False, slots=True)
class Ref:
    """What a remote call will return. `data` is pickled, as it crosses processes."""

    is_ready: bool = False
    data: bytes = b""
    is_lost: bool = False


@dataclass(slots=True)
class Attempt:
    """One execution of a task: when the GPU computes, and what it leaves in the store at which
    time."""

    task: Task
    end: float
    computes: list[tuple[float, float]]
    effects: Sequence[tuple[float, Callable[[], None]]]


class Bodies(Protocol):
    """What tasks do: `begin` says how long one takes on a node, and what it leaves."""

    tally: Tally

    def begin(self, task: Task, node: Node, now: float) -> Attempt: ...


class Method:
    """`actor.name`, whose `remote` calls."""

    def __init__(self, call: Callable[..., Ref]) -> None:
        self.remote = call


class Actor:
    """A worker as RayRunner sees it: `start`, `execute` and `close`."""

    def __init__(self, sim: "SimulatedRay") -> None:
        self.sim, self.is_dead = sim, False
        self.node: Node | None = None
        self.open: Ref | None = None
        self.attempt: Attempt | None = None
        self.start, self.execute, self.close = (
            Method(self.call_start),
            Method(self.call_execute),
            Method(self.call_close),
        )

    def call_start(self, is_verbose: bool, probe: str | None) -> Ref:
        assert self.open is not None
        return self.open

    def call_close(self) -> Ref:
        return Ref(is_ready=True)

    def call_execute(self, task: Task) -> Ref:
        return self.sim.execute(self, pickle.dumps(task))


class Factory:
    """`ray.remote(WorkerProcess)`, with options or without."""

    def __init__(self, sim: "SimulatedRay") -> None:
        self.sim = sim

    def options(self, **_: object) -> "Factory":
        return self

    def remote(self, plan_json: bytes, store_uri: str) -> Actor:
        return self.sim.start_actor()


class SimulatedRay:
    """The calls of the module `ray` that RayRunner makes, in virtual time. Their own processor time
    is kept apart in `cpu_s`."""

    def __init__(self, fleet: Fleet, stubs: Bodies) -> None:
        self.fleet, self.stubs, self.tally = fleet, stubs, stubs.tally
        self.now, self.cpu_s, self.first_execute = 0.0, 0.0, 0.0
        self.streamed = 0.0  # when the last stream ended
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = self.num_launched = 0
        self.random = random.Random(fleet.seed)
        self.machines: list[Node] = []
        self.pending: deque[Actor] = deque()

    def is_initialized(self) -> bool:
        return True

    def remote(self, kind: type) -> Factory:
        return Factory(self)

    def nodes(self) -> list[dict[str, Any]]:
        with self.aside():
            return [
                {"NodeID": n.id, "Alive": n.lost_at is None, "Resources": {"CPU": 1.0}}
                for n in self.machines
                if n.is_up
            ]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": float(sum(n.free + len(n.actors) for n in self.alive()))}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": float(sum(n.free for n in self.alive()))}

    def get(self, ref: Ref) -> Any:
        if ref.is_lost:
            raise RayActorError()
        return pickle.loads(ref.data)

    def wait(
        self, refs: Sequence[Ref], num_returns: int, timeout: float
    ) -> tuple[list[Ref], list[Ref]]:
        """Lets virtual time pass until one of the references is ready, or the timeout."""
        with self.aside():
            deadline = self.now + timeout
            while not (ready := [r for r in refs if r.is_ready][:num_returns]):
                assert self.events, "nothing will ever happen"
                if self.events[0][0] > deadline:
                    self.now = deadline
                    break
                self.now, _, action = heappop(self.events)
                action()
            return ready, [r for r in refs if r not in ready]

    def kill(self, actor: Actor) -> None:
        with self.aside():
            if actor in self.pending:
                self.pending.remove(actor)
            if not actor.is_dead:
                actor.is_dead = True
                if actor.node is not None and actor.node.lost_at is None:
                    self.interrupt(actor)
                    actor.node.actors.remove(actor)
                    actor.node.free += 1
                    self.place()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Whatever runs inside is the simulation's, not the driver's."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.cpu_s += time.thread_time() - start

    def at(self, when: float, action: Callable[[], None]) -> None:
        self.num_events += 1
        heappush(self.events, (when, self.num_events, action))

    def alive(self) -> list[Node]:
        return [n for n in self.machines if n.is_up and n.lost_at is None]

    def start_actor(self) -> Actor:
        with self.aside():
            actor = Actor(self)
            actor.open = Ref()
            self.pending.append(actor)
            self.place()
            return actor

    def place(self) -> None:
        """Pending actors on free GPUs, fullest node first; nodes for the rest, up to the fleet's
        number."""
        for node in sorted(self.alive(), key=lambda n: n.free):
            while node.free and self.pending:
                actor = self.pending.popleft()
                actor.node = node
                node.free -= 1
                node.actors.append(actor)
                self.at(self.now + self.fleet.start_s, partial(self.settle, actor, node.id))
        booting = sum(not n.is_up for n in self.machines)
        missing = math.ceil(len(self.pending) / self.fleet.node_gpus) - booting
        for _ in range(min(missing, self.fleet.max_nodes - booting - len(self.alive()))):
            self.launch()

    def launch(self) -> None:
        wait_s = self.fleet.replace_s if self.num_launched >= self.fleet.max_nodes else 0.0
        self.num_launched += 1
        node = Node(
            id=f"node-{self.num_launched:04d}",
            free=self.fleet.node_gpus,
            paid_from=self.now + wait_s,
        )
        self.machines.append(node)
        self.at(node.paid_from + self.fleet.boot_s, lambda: self.arrive(node))

    def arrive(self, node: Node) -> None:
        node.is_up = True
        if self.fleet.losses_per_s:
            self.at(
                self.now + self.random.expovariate(self.fleet.losses_per_s), lambda: self.lose(node)
            )
        self.place()

    def lose(self, node: Node) -> None:
        """A node goes with everything on it; RayRunner hears of it `detect_s` later."""
        node.lost_at = self.now
        self.tally.nodes_lost += 1
        for actor in node.actors:
            actor.is_dead = True
            self.interrupt(actor)
            if actor.open is not None:
                self.at(self.now + self.fleet.detect_s, partial(self.fail, actor.open))

    def interrupt(self, actor: Actor) -> None:
        """What an attempt had done by now counts, the rest does not happen."""
        if actor.attempt is not None:
            self.account(actor.attempt)
            actor.attempt = None

    def account(self, attempt: Attempt) -> None:
        self.tally.busy_s += sum(
            max(0.0, min(end, self.now) - start) for start, end in attempt.computes
        )

    def fail(self, ref: Ref) -> None:
        ref.is_lost = ref.is_ready = True

    def settle(self, actor: Actor, result: object) -> None:
        """An actor's open call returns, if it still lives."""
        if actor.is_dead:
            return
        assert actor.open is not None
        actor.open.data, actor.open.is_ready, actor.open = pickle.dumps(result), True, None

    def execute(self, actor: Actor, task_data: bytes) -> Ref:
        with self.aside():
            self.first_execute = self.first_execute or time.perf_counter()
            actor.open = ref = Ref()
            node = actor.node
            assert node is not None
            if actor.is_dead:
                assert node.lost_at is not None
                self.at(max(self.now, node.lost_at + self.fleet.detect_s), lambda: self.fail(ref))
                return ref
            start = self.now
            actor.attempt = attempt = self.stubs.begin(pickle.loads(task_data), node, start)
            for when, effect in attempt.effects:
                self.at(when, partial(self.happen, actor, attempt, effect))
            self.at(attempt.end, lambda: self.finish(actor, attempt, start))
            return ref

    def happen(self, actor: Actor, attempt: Attempt, effect: Callable[[], None]) -> None:
        """An effect of an attempt, unless the attempt was cut off."""
        if actor.attempt is attempt:
            effect()

    def finish(self, actor: Actor, attempt: Attempt, start: float) -> None:
        if actor.is_dead:
            return
        self.account(attempt)
        actor.attempt = None
        if attempt.task.layer is None:
            self.streamed = self.now
        facts = {"tokens": attempt.task.load, "solve_s": attempt.end - start}
        self.settle(actor, TaskResult(task=attempt.task, seconds=attempt.end - start, facts=facts))
