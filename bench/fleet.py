"""Simulate a whole run on a fleet of spot GPUs in virtual time: the real driver, pretended workers.

    python bench/fleet.py --out runs/fleet
        Kimi-K2.5's plan, 1 to 64 GPUs, three loss rates: ten minutes on 2 cores
    python bench/fleet.py --out runs/fleet --gpus 8 64 --gpus-per-node 8 --loss-rates 0 0.1 \\
        --loss-per node --price 3
    python bench/fleet.py --out runs/fleet --unit-seconds 40 --bandwidth 5
        other measured times, another store

Real: plan and output layout from a header-only checkpoint, `Job.stream_and_compress` with its
`Overlap`, `run_all`, `RayRunner` with its `Dispatcher`, attempts and preemptions, needs, cleanup,
`write_layer_scales`, all records (a UnitManifest of 24 linears a unit), a store in memory.
Pretended: the module `ray` as `RayRunner` sees it (`SimulatedRay`: a queue of events with a clock),
and the stages' bodies, which only write the objects that mark work as done.

What is assumed (printed with the results, with the numbers in force):
    time of a unit     measured launch costs (whatever the unit holds) plus products (in proportion
                       to its tokens), one H100 (p48ray.estimate.duration)
    tokens an expert   lognormal popularity, sigma 0.5 within a layer, not measured
    streaming stages   the assumed rate of p48ray.estimate.duration; reading, computing and writing
                       one after the other; workers of a node share its link evenly
    a node's link      one queue for reads, first come first served; writes at the same rate beside
                       it; the store itself has no limit
    activations,       reads "shared" (DESIGN 9): once per node and layer, kept while they are among
    gradients          the last `--layers-held`; reads "own" (nodes without room for a cache): every
                       unit reads them itself, once
    source layers      "shared": once per node and direction; "own": once per worker and direction
    scratch            run.scratch on the disk of one node: what streams leave is written and read
                       at `--scratch` GB/s each way, a layer once (then it is in memory); its
                       writers hash it; each unit picks its own rows
    SHA-256            of what is read from the store, at `--hash-rate` in the process that reads
                       it, afterwards
    losses             a node is lost as a whole; times are exponential, independent, without
                       warning; seen after `--detect-s`
    nodes              asked for when workers wait; a first node takes `--boot-s`, one in a lost
                       one's place `--replace-s` more; paid from its boot to its loss, or to the end
                       of compress
    not counted        reduce, verify, evaluate, the head, storage, requests, Ray's own processor
                       time in the driver (pickling is counted)
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.simulated_ray import Attempt, Fleet, Node, SimulatedRay, Tally
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.config.load import load_config
from p48ray.estimate.duration import loop_seconds, product_seconds
from p48ray.estimate.memory import routed_token_bytes, row_bytes, tokens_of_unit, value_bytes
from p48ray.estimate.plan_cost import estimate
from p48ray.estimate.rates import H200_NODE
from p48ray.report.report import build_report
from p48ray.run import run_root
from p48ray.run.checked import load_unit_manifests
from p48ray.run.manifest import (
    ActivationPart,
    GradientPart,
    LayerScales,
    LinearRecord,
    UnitManifest,
)
from p48ray.run.needs import Needs, read_needs
from p48ray.run.output_layout import unit_bytes
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.run_root import BlobKind
from p48ray.run.scale_counts import GroupHistogram
from p48ray.runner import cluster, ray_runner
from p48ray.runner.base import TaskList
from p48ray.runner.pipeline import Job
from p48ray.runner.progress import INTERVAL_S
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.tasks import Task, TaskResult
from p48ray.store.base import ObjectInfo
from p48ray.store.memory import MemoryStore

POPULARITY_SIGMA = 0.5
RAY_WORKERS = 2
LISTED_AT_ONCE = 1000  # keys of one LIST answer
STUB = b"-"  # stands for the bytes of an object


Place = tuple[BlobKind, int, int]
"""An object of a stream: its kind, layer and part."""


class Step(NamedTuple):
    """What a stream does at one layer: parts that are computed, for so many seconds each, those
    whose boundary is read, and what is left of them."""

    number: int
    computed: list[int]
    seconds: float
    read: Sequence[int]
    left: list[Place]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds and bytes of the pieces of work, from the plan. `up` and `back`: one part at one
    layer."""

    loop_s: float
    product_s: float
    mean_load: float
    layer_bytes: int  # activations and gradients of one layer
    source_unit_bytes: int
    unit_bytes: int
    source_layer_bytes: int
    up_s: float
    back_s: float
    boundary_bytes: int  # of one part
    rows_bytes: int  # activations of one part at one layer, or its gradients
    unit_rows_s: float  # a unit's rows picked from a layer in memory

    def unit_s(self, load: float) -> float:
        return self.loop_s + self.product_s * load / self.mean_load


def costs_of(prepared: Prepared, unit_seconds: float | None = None) -> Costs:
    """Costs of a plan.

    Args:
        unit_seconds: measured, of a unit with the mean number of tokens; the shares of loops and
            products stay.
    """
    plan, layout = prepared.plan, prepared.layout
    e = estimate(plan, prepared.source, layout, prepared.shards)
    loop_s, product_s = (f(plan, layout) / len(plan.units) for f in (loop_seconds, product_seconds))
    factor = 1.0 if unit_seconds is None else unit_seconds / (loop_s + product_s)
    c, parts = plan.config.calibration, len(plan.parts)
    rows = e.num_tokens * row_bytes(layout.hidden_size, c.stored_bits)
    unit_rows = tokens_of_unit(plan) * routed_token_bytes(layout.hidden_size, plan.config)
    up_s = e.stream_gpu_hours * 3600 / len(plan.parts) / plan.passes.num_computed
    per_unit = plan.config.run.experts_per_unit
    return Costs(
        loop_s=factor * loop_s,
        product_s=factor * product_s,
        mean_load=e.num_tokens * layout.top_k * per_unit / layout.num_experts,
        layer_bytes=e.activation_bytes // len(plan.layers) + plan.uses_gradients * rows,
        source_unit_bytes=(e.source_bytes - e.untouched_bytes) // len(plan.units),
        unit_bytes=unit_bytes(layout, plan.units[0]),
        source_layer_bytes=(e.source_bytes - e.untouched_bytes) // len(plan.layers),
        up_s=up_s,
        back_s=2 * up_s,
        boundary_bytes=e.num_tokens * layout.hidden_size * value_bytes(plan) // parts,
        rows_bytes=rows // parts,
        unit_rows_s=unit_rows / H200_NODE.gather_bytes,
    )


class Stubs:
    """The stages' bodies: how long they take on a node, and the objects that they leave."""

    def __init__(self, prepared: Prepared, fleet: Fleet, costs: Costs) -> None:
        self.plan, self.layout = prepared.plan, prepared.layout
        self.store = MemoryStore(prepared.store.uri.removeprefix("memory://"))
        self.fleet, self.costs, self.tally = fleet, costs, Tally()
        self.routing = {n: self.tokens_per_expert(n) for n in self.plan.layers}

    def tokens_per_expert(self, layer: int) -> list[int]:
        """Of one part."""
        weights = random.Random(layer)
        popularity = [
            weights.lognormvariate(0, POPULARITY_SIGMA) for _ in range(self.layout.num_experts)
        ]
        c = self.plan.config.calibration
        routed = c.sequences_per_part * c.sequence_length * self.layout.top_k
        return [round(routed * p / sum(popularity)) for p in popularity]

    def begin(self, task: Task, node: Node, now: float) -> Attempt:
        return (
            self.unit(task, node, now) if task.stage == "compress" else self.stream(task, node, now)
        )

    def unit(self, task: Task, node: Node, now: float) -> Attempt:
        """Activations and gradients, the unit's experts, work, its shard."""
        unit, c, b = task.item, self.costs, self.fleet.bandwidth
        self.tally.attempts[unit.id] += 1
        self.tally.joined.add((node.id, unit.layer))
        if self.fleet.reads == "shared":
            ready = self.load_layer(node, unit.layer, now)
            ready += c.unit_rows_s * (self.fleet.scratch is not None)
        else:
            num_bytes = c.layer_bytes
            self.tally.bytes_read += num_bytes
            self.tally.layer_loads += 1
            ready = node.read(now, num_bytes, b) + num_bytes / self.fleet.hash_rate
        self.tally.bytes_read += c.source_unit_bytes
        ready = max(ready, node.read(now, c.source_unit_bytes, b))
        solved = ready + c.unit_s(task.load)
        written = solved + c.unit_bytes / b
        attempt = f"{self.tally.attempts[unit.id]:012x}"
        shard = (written, lambda: self.put(run_root.unit_shard(unit.id, attempt), c.unit_bytes))
        manifest = (written, lambda: self.store_manifest(unit, attempt, written, solved - ready))
        return Attempt(task, written, [(ready, solved)], [shard, manifest])

    def load_layer(self, node: Node, layer: int, now: float) -> float:
        """When a layer's activations and gradients are in the node's memory, read once: from its
        scratch, or from the store and then hashed by one of its processes."""
        num_bytes, f = self.costs.layer_bytes, self.fleet
        if layer not in node.layers:
            self.tally.layer_loads += 1
            if f.scratch is not None:
                node.layers[layer] = node.read_disk(now, num_bytes, f.scratch)
            else:
                self.tally.bytes_read += num_bytes
                read = node.read(now, num_bytes, f.bandwidth)
                node.layers[layer] = read + num_bytes / f.hash_rate
            while len(node.layers) > self.fleet.layers_held:
                node.layers.popitem(last=False)
        node.layers.move_to_end(layer)
        return max(now, node.layers[layer])

    def store_manifest(self, unit: WorkUnit, attempt: str, now: float, solve_s: float) -> None:
        """A record as large as the real one. First writer wins, as in unit.compress."""
        tokens = [self.routing[unit.layer][e] * len(self.plan.parts) for e in unit.experts]
        linears = tuple(
            LinearRecord(
                name=self.layout.expert_linear_name(unit.layer, expert, projection),
                tokens=tokens[n],
                outcome="solved",
                reason="",
                damp=0.1,
                shrinkage=0.24707865168539326,
                relative_weight_error=0.3182906210422516,
                relative_output_error=0.04127303510904312,
            )
            for projection in PROJECTIONS
            for n, expert in enumerate(unit.experts)
        )
        layer = LayerScales.load(self.store, run_root.layer_scales(unit.layer))
        scales = (layer.gate_up, layer.down)
        manifest = UnitManifest(
            units_digest=self.plan.units_digest,
            unit=unit.id,
            attempt=attempt,
            size_bytes=self.costs.unit_bytes,
            sha256=hashlib.sha256(unit.id.encode()).hexdigest(),
            data_offset=11768,
            input_global_scales=scales,
            linears=linears,
            clipped_input_share=0.0,
            clipped_intermediate_share=2.5e-7,
            seconds={
                "fetch": 24.0,
                "curvature": 9.5,
                "solve": round(solve_s, 3),
                "refine": 52.8,
                "write": 0.1,
            },
            finished_at=round(now, 3),
            device="simulated",
            versions={
                "p48ray": "simulated",
                "torch": "simulated",
                "transformers": "simulated",
                "compressed-tensors": "simulated",
            },
        )
        if not self.store.put_if_absent(run_root.unit_manifest(unit.id), manifest.to_json()):
            self.store.delete(run_root.unit_shard(unit.id, attempt))

    def put(self, key: str, num_bytes: float) -> None:
        self.store.put(key, STUB)
        self.tally.bytes_written += num_bytes

    def stream(self, task: Task, node: Node, now: float) -> Attempt:
        """Parts up the layers, or through a segment, from where the store says that they are; what
        is written counts at the end of each layer."""
        needs = read_needs(self.plan, self.store)
        steps = (
            self.steps_up(needs, task.item)
            if task.stage == "capture"
            else self.steps_back(needs, *task.item)
        )
        sharers = min(self.plan.config.run.capture_workers or 1, self.fleet.node_gpus)
        link = self.fleet.bandwidth / sharers
        blobs = link if self.fleet.scratch is None else self.fleet.scratch / sharers
        computes, effects = [], []
        for step in steps:
            source_bytes = (
                self.source_reads(step.computed) * self.costs.source_layer_bytes
                if step.number in self.plan.layers
                else 0.0
            )
            read_bytes = len(step.read) * self.costs.boundary_bytes
            ready = now + source_bytes / link + read_bytes / blobs
            solved = ready + len(step.computed) * step.seconds
            now = solved + sum(self.blob_bytes(kind) for kind, _, _ in step.left) / blobs
            self.tally.bytes_read += source_bytes + read_bytes * (self.fleet.scratch is None)
            computes.append((ready, solved))
            effects.append((now, partial(self.leave, step.left)))
        return Attempt(task, now, computes, effects)

    def steps_up(self, needs: Needs, parts: list[int]) -> Iterator[Step]:
        """The forward pass, layer by layer."""
        passes, ways = self.plan.passes, {p: needs.forward_layers(p) for p in parts}
        self.tally.parts_repeated += sum(len(w) not in (0, passes.num_up) for w in ways.values())
        for number in range(passes.num_up):
            own = [p for p in parts if number in ways[p]]
            left: list[Place] = [("residuals", number + 1, p) for p in own]
            left = left if number + 1 in passes.boundaries else []
            if passes.sees_forth and number in self.plan.layers:
                left += [("activations", number, p) for p in own]
            if own:
                yield Step(number, own, self.costs.up_s, (), left)

    def steps_back(self, needs: Needs, number: int, parts: list[int]) -> Iterator[Step]:
        """A segment up, then back down."""
        visits = {p: v for p in parts for v in needs.visits(p) if number in v.segment}
        whole = self.plan.passes.segment_of(number)
        layers = range(whole.start, min(whole.stop, self.plan.source.num_layers))
        self.tally.parts_repeated += sum(
            v.up != layers for v in visits.values() if v.segment.start >= self.plan.layers[0]
        )
        for n in layers:
            own = [p for p, v in visits.items() if n in v.up]
            read = [p for p in own if n and n == visits[p].up.start]
            left: list[Place] = [("activations", n, p) for p in own if n in visits[p].seen]
            if own:
                yield Step(n, own, self.costs.up_s, read, left)
        for n in reversed(whole):
            passing = [p for p, v in visits.items() if n in v.back]
            own = [p for p in passing if n in visits[p].entered]
            stored = n + 1 if n < self.plan.source.num_layers else None
            read = [p for p in passing if visits[p].back.stop == stored]
            left = [("gradients", n, p) for p in passing if n in visits[p].felt]
            if n == whole.start:
                left += [("residual-gradients", n, p) for p in own]
            if passing:
                yield Step(n, own, self.costs.back_s, read, left)

    def source_reads(self, parts: list[int]) -> float:
        """How often one worker reads a layer of the source; a node's workers share what is read
        once per node."""
        sharers = min(self.plan.config.run.capture_workers or 1, self.fleet.node_gpus)
        if not parts or self.fleet.reads == "shared":
            return bool(parts) / sharers
        return 1.0

    def blob_bytes(self, kind: BlobKind) -> int:
        """Of one part."""
        is_rows = kind in ("activations", "gradients")
        return self.costs.rows_bytes if is_rows else self.costs.boundary_bytes

    def leave(self, places: Sequence[Place]) -> None:
        """Objects of one layer."""
        for kind, number, part in places:
            in_store = self.fleet.scratch is None
            self.put(run_root.blob(kind, number, part), self.blob_bytes(kind) * in_store)
            record = b"{}"
            if kind == "activations":
                record = self.activation_record(number, part).to_json()
            elif kind == "gradients":
                facts = self.facts(number, part)
                record = GradientPart(mean_square=1e-6, **facts).to_json()
            self.store.put(run_root.blob_manifest(kind, number, part), record)

    def activation_record(self, layer: int, part: int) -> ActivationPart:
        return ActivationPart(
            amax_input=41.5,
            amax_by_expert=(87.25,),
            input_groups=GroupHistogram(first=0, counts=()),
            intermediate_groups=GroupHistogram(first=0, counts=()),
            tokens_per_expert=tuple(self.routing[layer]),
            **self.facts(layer, part),
        )

    def facts(self, layer: int, part: int) -> dict[str, Any]:
        c = self.plan.config.calibration
        sizes = {
            "num_tokens": c.sequences_per_part * c.sequence_length,
            "size_bytes": self.costs.rows_bytes,
            "sha256": "0" * 64,
        }
        return {
            "units_digest": self.plan.units_digest,
            "layer": layer,
            "part": part,
            "seconds": 1.0,
            "write_seconds": 0.0,
            "finished_at": 0.0,
        } | sizes


class CountingStore(MemoryStore):
    """The driver's handle: how often it lists, and what."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts: Counter[str] = Counter()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(super().list(prefix))
        self.counts.update(
            {
                "listings": 1,
                "pages": max(1, math.ceil(len(found) / LISTED_AT_ONCE)),
                "keys": len(found),
            }
        )
        return iter(found)

    def head(self, key: str) -> ObjectInfo | None:
        self.counts["heads"] += 1
        return super().head(key)

    def get(self, key: str) -> bytes:
        self.counts["gets"] += 1
        return super().get(key)

    def delete(self, key: str) -> None:
        self.counts["deletes"] += 1
        super().delete(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One simulated run; times in hours of virtual time unless the name says otherwise."""

    gpus: int
    gpus_per_node: int
    loss_rate: float
    loss_per: str
    reads: str
    scratch: float | None
    hours: float
    stream_hours: float
    gpu_hours: float
    nodes_lost: int
    units_repeated: int
    parts_repeated: int
    layers_joined: int
    layer_loads: int
    bytes_read: float
    bytes_written: float
    idle_share: float
    driver_ms_per_unit: float  # streams included


def sized(prepared: Prepared, fleet: Fleet, name: str, keep: str) -> Prepared:
    """The plan for this fleet (worker counts are free to change) on a store of its own."""
    config = prepared.plan.config
    streams = min(config.run.capture_workers or fleet.gpus, fleet.gpus)
    run = config.run.model_copy(
        update={
            "num_workers": fleet.gpus,
            "capture_workers": streams,
            "keep": keep,
            "prefetch_units": 0,
        }
    )
    plan: RunPlan = prepared.plan.model_copy(
        update={"config": config.model_copy(update={"run": run})}
    )
    return dataclasses.replace(prepared, plan=plan, store=CountingStore(name))


def simulate(prepared: Prepared, fleet: Fleet, costs: Costs) -> tuple[Outcome, SimulatedRay]:
    """Capture, gradients and compress, or what the store lacks of them, by the real driver. Raises
    whatever the driver raises."""
    stubs = Stubs(prepared, fleet, costs)
    sim = SimulatedRay(fleet, stubs)
    # (virtual time, the driver's own processor time) before and after
    clock: list[tuple[float, float]] = []

    def mark() -> None:
        clock.append((sim.now, time.process_time() - sim.cpu_s))

    with (
        mock.patch.object(ray_runner, "ray", sim),
        mock.patch.object(cluster, "ray", sim),
        RayRunner(prepared.plan, prepared.store.uri, None) as runner,
    ):
        job = Job(prepared, runner, {}, lambda: sim.now)
        mark()
        job.stream_and_compress()
        mark()
        end, streamed = sim.now, sim.streamed
    (_, cpu_0), (_, cpu_1) = clock
    paid_s = (
        sum(max(0.0, (end if n.lost_at is None else n.lost_at) - n.paid_from) for n in sim.machines)
        * fleet.node_gpus
    )
    t = sim.tally
    begun = max(1, len(t.attempts))
    outcome = Outcome(
        gpus=fleet.gpus,
        gpus_per_node=fleet.node_gpus,
        loss_rate=fleet.loss_rate,
        loss_per=fleet.loss_per,
        reads=fleet.reads,
        scratch=fleet.scratch,
        hours=end / 3600,
        stream_hours=streamed / 3600,
        gpu_hours=paid_s / 3600,
        nodes_lost=t.nodes_lost,
        units_repeated=t.attempts.total() - len(t.attempts),
        parts_repeated=t.parts_repeated,
        layers_joined=len(t.joined),
        layer_loads=t.layer_loads,
        bytes_read=t.bytes_read,
        bytes_written=t.bytes_written,
        idle_share=1 - t.busy_s / paid_s,
        driver_ms_per_unit=1000 * (cpu_1 - cpu_0) / begun,
    )
    return outcome, sim


def clear(store: MemoryStore) -> None:
    for info in list(MemoryStore.list(store)):
        MemoryStore.delete(store, info.key)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_driver(prepared: Prepared, fleet: Fleet, costs: Costs) -> dict[str, Any]:
    """One undisturbed run, its report, a tick of progress, and a resume when half of it is there.
    To be called first: memory is the process's peak."""
    facts: dict[str, Any] = {"prepare_peak_bytes": peak_bytes()}
    whole = sized(prepared, fleet, "fleet-driver", "all")
    store = whole.store
    assert isinstance(store, CountingStore)
    outcome, _ = simulate(whole, fleet, costs)
    facts |= {"run_counts": dict(store.counts), "ms_per_unit": outcome.driver_ms_per_unit}
    facts["run_peak_bytes"] = peak_bytes()
    start = time.process_time()
    build_report(
        whole.context, load_unit_manifests(whole.plan, whole.store), whole.shards, None, {}
    )
    facts |= {"report_s": time.process_time() - start, "peak_bytes": peak_bytes()}
    facts["stored_bytes"] = sum(info.size_bytes for info in MemoryStore.list(store))
    start = time.process_time()
    keys = {info.key for info in store.list(run_root.UNITS)}
    len({run_root.unit_manifest(u.id) for u in whole.plan.units} & keys)
    facts |= {
        "tick_ms": 1000 * (time.process_time() - start),
        "tick_pages": math.ceil(len(keys) / LISTED_AT_ONCE),
    }
    for unit in whole.plan.units[::2]:
        for info in list(MemoryStore.list(store, f"{run_root.UNITS}{unit.id}/")):
            MemoryStore.delete(store, info.key)
    facts["resume_keys"] = len(list(MemoryStore.list(store)))
    start = time.perf_counter()
    needs = read_needs(whole.plan, store)
    facts |= {"resume_units": len(needs.missing_units), "needs_s": time.perf_counter() - start}
    store.counts.clear()
    at_first: dict[str, int] = {}
    begin = Stubs.begin

    def noting(self: Stubs, task: Task, node: Node, now: float) -> Attempt:
        if not at_first:
            at_first.update(store.counts)
        return begin(self, task, node, now)

    start = time.perf_counter()
    with mock.patch.object(Stubs, "begin", noting):
        resumed, sim = simulate(whole, fleet, costs)
    facts |= {
        "resume_s": sim.first_execute - start,
        "resume_counts": at_first,
        "resumed_repeats": resumed.units_repeated,
    }
    clear(store)
    return facts


class IdleWorker:
    """A real actor that does nothing with its tasks."""

    def __init__(self, plan_json: bytes, store_uri: str) -> None:
        """As WorkerProcess."""

    def start(self, is_verbose: bool, probe: str | None) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def close(self) -> None:
        """Nothing to let go of."""

    def execute(self, task: Task) -> TaskResult:
        return TaskResult(task=task, facts={"tokens": task.load})


def measure_ray(prepared: Prepared) -> dict[str, float]:
    """All units through RayRunner and a real Ray. Its threads in the driver's process count."""
    run_settings = prepared.plan.config.run.model_copy(
        update={"num_workers": RAY_WORKERS, "threads_per_worker": 1, "gpus_per_worker": 0.0}
    )
    plan = prepared.plan.model_copy(
        update={"config": prepared.plan.config.model_copy(update={"run": run_settings})}
    )
    tasks = [
        Task(
            stage="compress",
            id=u.id,
            item=u,
            marker=run_root.unit_manifest(u.id),
            layer=u.layer,
            load=1.0,
        )
        for u in plan.units
    ]
    with (
        mock.patch.object(ray_runner, "WorkerProcess", IdleWorker),
        RayRunner(plan, "memory://fleet-ray", None) as runner,
    ):
        # workers are up
        assert all(r.is_done for r in runner.run(TaskList(tasks[: 2 * RAY_WORKERS])))
        start, cpu = time.perf_counter(), time.process_time()
        done = sum(r.is_done for r in runner.run(TaskList(tasks)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    assert done == len(tasks)
    return {
        "ray_ms_per_task": 1000 * cpu / done,
        "ray_wall_ms_per_task": 1000 * wall / done,
        "ray_peak_bytes": peak_bytes(),
    }


def assumptions(args: argparse.Namespace, c: Costs) -> list[str]:
    return [
        (
            f"A unit takes {c.loop_s:.0f} s of launches and {c.product_s:.0f} s of products at the"
            f" mean {c.mean_load:,.0f} routed tokens (estimate/duration.py's figures of one H100)."
            f" Tokens per expert: lognormal popularity, sigma {POPULARITY_SIGMA}, not measured."
        ),
        (
            f"A node's link {args.bandwidth:g} GB/s, SHA-256 {args.hash_rate:g} GB/s a process,"
            f" {args.layers_held} layers held by a node. A layer's activations and gradients are"
            f" {c.layer_bytes / 1e9:.1f} GB, a unit's experts {c.source_unit_bytes / 1e6:.0f} MB,"
            f" its shard {c.unit_bytes / 1e6:.0f} MB."
        ),
        (
            f"A node boots in {args.boot_s:g} s (paid), one in a lost one's place comes"
            f" {args.replace_s:g} s later (not paid), a worker starts in {args.start_s:g} s."
            f" Losses: per {'GPU' if args.loss_per == 'gpu' else 'node'}-hour, exponential, whole"
            f" nodes, no warning, seen after {args.detect_s:g} s. {args.price:g} a GPU-hour. Seed"
            f" {args.seed}."
        ),
        (
            "Reads 'shared': activations and gradients once per node and layer; source layers once"
            " per node and direction (DESIGN 9). Reads 'own': every unit reads its layer's"
            " activations and gradients once; source layers once per worker and direction."
            " 'scratch': what streams leave lies on the disk of one node, written and read at its"
            " rate, a layer once, and not hashed again."
        ),
        (
            f"Streaming: {c.up_s:.2f} s up and {c.back_s:.2f} s back for a part at a layer (assumed"
            " rate); read, compute and write one after the other; at most run.capture_workers"
            " GPUs, and only the nodes that they need."
        ),
        (
            "Not counted: units read ahead, reduce, verify, evaluate, the head node, storage,"
            " requests, limits of the store."
        ),
        (
            "Driver: processor time of the real Job, RayRunner, Dispatcher, run_all, needs and"
            " collect, pickling included, the simulation's own taken off; listings come from"
            " memory, Ray's own share is measured apart (--ray)."
        ),
    ]


COLUMNS = (
    "GPUs",
    "a node",
    "losses /h",
    "reads",
    "hours",
    "streaming",
    "GPU-hours",
    "cost",
    "nodes lost",
    "units repeated",
    "layers joined",
    "read, TB",
    "idle",
    "driver, ms a unit",
)


def cells(o: Outcome, price: float) -> list[str]:
    head = [
        str(o.gpus),
        str(o.gpus_per_node),
        f"{o.loss_rate:g}",
        o.reads if o.scratch is None else f"scratch {o.scratch / 1e9:g} GB/s",
        f"{o.hours:.1f}",
        f"{o.stream_hours:.2f}",
    ]
    work = [
        f"{o.gpu_hours:,.0f}",
        f"{o.gpu_hours * price:,.0f}",
        str(o.nodes_lost),
        str(o.units_repeated),
        str(o.layers_joined),
    ]
    return [
        *head,
        *work,
        f"{o.bytes_read / 1e12:,.1f}",
        f"{100 * o.idle_share:.0f} %",
        f"{o.driver_ms_per_unit:.2f}",
    ]


def driver_lines(d: dict[str, Any]) -> list[str]:
    asked, run = d["resume_counts"], d["run_counts"]
    mb = {
        key: f"{d[key] / 1e6:.0f} MB"
        for key in ("prepare_peak_bytes", "run_peak_bytes", "peak_bytes", "stored_bytes")
    }
    lines = [
        (
            f"Driver, {d['gpus']} GPUs, {d['num_units']:,} units, {d['num_linears']:,} linears:"
            f" {d['ms_per_unit']:.2f} ms of processor time a unit, capture and gradients included;"
            f" the report {d['report_s']:.1f} s."
        ),
        (
            f"Peak RSS: {mb['prepare_peak_bytes']} after planning, {mb['run_peak_bytes']} after"
            f" compress, {mb['peak_bytes']} with the report; {mb['stored_bytes']} of it are the"
            " store's objects, which a bucket holds elsewhere."
        ),
        (
            f"A tick of progress, every {INTERVAL_S:g} s, lists units/: {d['tick_ms']:.0f} ms and"
            f" {d['tick_pages']} pages at the end of the run."
        ),
        (
            f"Resume of a half-done run root ({d['resume_keys']:,} keys, keep: all): listing and"
            f" needs {d['needs_s']:.2f} s, {d['resume_units']:,} units open; from the start to the"
            f" first unit handed out {d['resume_s']:.2f} s, in which the store was asked for"
            f" {asked.get('listings', 0)} listings ({asked.get('pages', 0)} pages of"
            f" {LISTED_AT_ONCE:,} keys), {asked.get('heads', 0)} HEAD, {asked.get('gets', 0)} GET;"
            f" units done twice: {d['resumed_repeats']}."
        ),
        (
            f"Capture, gradients and compress ask for {run.get('listings', 0)} listings"
            f" ({run.get('pages', 0):,} pages) besides ticks, {run.get('heads', 0)} HEAD,"
            f" {run.get('gets', 0):,} GET."
        ),
    ]
    if "ray_ms_per_task" in d:
        lines.append(
            f"With a real Ray and {RAY_WORKERS} workers that do nothing: {d['ray_ms_per_task']:.2f}"
            " ms of the driver's processor time a task, RayRunner's included, and"
            f" {d['ray_wall_ms_per_task']:.2f} ms of wall clock; peak RSS"
            f" {d['ray_peak_bytes'] / 1e6:.0f} MB."
        )
    return lines


def markdown(outcomes: list[Outcome], lines: list[str], price: float) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(o, price) for o in outcomes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return table + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/kimi_k25_p48_nvfp4.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--gpus-per-node", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--loss-rates", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument(
        "--loss-per",
        choices=["gpu", "node"],
        default="gpu",
        help="a node of 8 GPUs is lost 8 times as often per GPU-hour rate",
    )
    parser.add_argument(
        "--own-gpus",
        type=int,
        nargs="*",
        default=[1, 8, 64],
        help="also with reads 'own', without losses",
    )
    parser.add_argument(
        "--scratch",
        type=float,
        nargs="*",
        default=[1.2, 10.0],
        help="also one node with run.scratch at so many GB/s each way, without losses",
    )
    parser.add_argument("--keep", choices=["all", "units"], default="units")
    parser.add_argument(
        "--unit-seconds",
        type=float,
        help="of a unit with the mean number of tokens, instead of p48ray.estimate.duration's",
    )
    parser.add_argument("--bandwidth", type=float, default=2.5, help="of a node to the store, GB/s")
    parser.add_argument("--hash-rate", type=float, default=1.5, help="SHA-256 of one process, GB/s")
    parser.add_argument("--layers-held", type=int, default=2)
    parser.add_argument("--replace-s", type=float, default=300.0)
    parser.add_argument("--boot-s", type=float, default=240.0)
    parser.add_argument("--start-s", type=float, default=30.0)
    parser.add_argument("--detect-s", type=float, default=15.0)
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU-hour")
    parser.add_argument(
        "--ray",
        action="store_true",
        help="also measure the driver's share with a real Ray on this machine",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    logging.getLogger("p48ray").setLevel(logging.ERROR)  # every preemption is a warning
    with tempfile.TemporaryDirectory() as folder:
        write_kimi_k25_skeleton(folder)
        config = load_config(
            args.config, (f"source.checkpoint={folder}", *args.overrides), "memory://fleet"
        )
        prepared = prepare(config, is_dry=True)
    run(args, prepared, Console(width=160))


def run(args: argparse.Namespace, prepared: Prepared, console: Console) -> None:
    costs = costs_of(prepared, args.unit_seconds)
    keys = ("layers_held", "replace_s", "boot_s", "start_s", "detect_s", "loss_per", "seed")
    shared = {key: vars(args)[key] for key in keys} | {
        "bandwidth": args.bandwidth * 1e9,
        "hash_rate": args.hash_rate * 1e9,
    }
    widest = Fleet(gpus=max(args.gpus), gpus_per_node=max(args.gpus_per_node), **shared)
    driver = measure_driver(prepared, widest, costs)
    driver |= {"gpus": widest.gpus, "num_units": len(prepared.plan.units)}
    driver["num_linears"] = sum(u.num_experts for u in prepared.plan.units) * len(PROJECTIONS)
    if args.ray:
        driver |= measure_ray(prepared)
    fleets = [
        Fleet(gpus=gpus, gpus_per_node=min(size, gpus), loss_rate=rate, **shared)
        for size in args.gpus_per_node
        for rate in args.loss_rates
        for gpus in args.gpus
    ]
    fleets += [
        Fleet(gpus=gpus, gpus_per_node=min(gpus, max(args.gpus_per_node)), reads="own", **shared)
        for gpus in args.own_gpus
    ]
    one_node = max(args.gpus_per_node)
    fleets += [
        Fleet(gpus=one_node, gpus_per_node=one_node, scratch=rate * 1e9, **shared)
        for rate in args.scratch
    ]
    outcomes = []
    for fleet in dict.fromkeys(fleets):
        mine = sized(prepared, fleet, "fleet", args.keep)
        outcomes.append(simulate(mine, fleet, costs)[0])
        clear(mine.store)  # type: ignore[arg-type]
        print(" ".join(cells(outcomes[-1], args.price)), flush=True)
    table = Table(*COLUMNS)
    for o in outcomes:
        table.add_row(*cells(o, args.price))
    console.print(table)
    lines = [*driver_lines(driver), *assumptions(args, costs)]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "cores": os.cpu_count(),
        "price": args.price,
        "driver": driver,
        "costs": dataclasses.asdict(costs),
        "notes": lines,
    }
    facts["rows"] = [dataclasses.asdict(o) for o in outcomes]
    (args.out / "fleet.json").write_text(json.dumps(facts, indent=1))
    (args.out / "fleet.md").write_text(markdown(outcomes, lines, args.price))


if __name__ == "__main__":
    main()
