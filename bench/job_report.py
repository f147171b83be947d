"""What a run root, its trace and a watch say of where a job's time went: one tree of plain values.

A stage lasts from the beginning of its first task to the end of its last, by the spans of
p48ray.trace. A run root of before the spans has no such: there manifests tell when parts and units
were finished, and report.json how long the other stages took, which end with the youngest file that
they leave. Stages overlap, so their seconds do not add up to the job's.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from bench.job_watch import Watch, files_under
from p48ray.config import RunConfig
from p48ray.estimate.plan_cost import estimate
from p48ray.stages.prepare import prepare

STAGES = ("capture", "gradients", "compress", "reduce", "verify", "evaluate")
TASK = "task"
PLANNED = ("_bytes", "_seconds", "_hours")
DATA = (".arrow", ".safetensors")  # what an estimate counts: neither manifests nor small files
FOLDERS = {
    "mirror_bytes": "source",
    "activation_bytes": "activations",
    "residual_bytes": "residuals",
    "unit_bytes": "units",
    "checkpoint_bytes": "checkpoint",
}
LEFT_BY = {  # stage -> what it leaves, for run roots without spans
    "reduce": "checkpoint/*.safetensors",
    "verify": "verification/*.json",
    "evaluate": "evaluation/*/part-*.json",
}

Span = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """Unix times."""

    start: float
    end: float


def read_spans(folder: Path) -> list[Span]:
    """All spans of all processes. The last line of one that was killed may be cut: it is left
    out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def read_units(root: Path) -> list[dict[str, Any]]:
    """Manifests by unit id, as JSON: of whatever version of the project."""
    return [json.loads(path.read_bytes()) for path in sorted(root.glob("units/*/manifest.json"))]


def read_report(root: Path) -> dict[str, Any]:
    """report.json, empty if the run did not come to it."""
    path = root / "report" / "report.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def digest_units(units: Iterable[Mapping[str, Any]]) -> str:
    """One SHA-256 over those of all shards, by unit id: equal for runs that came to the same
    bytes."""
    return hashlib.sha256(
        "".join(f"{u['unit']} {u['sha256']}\n" for u in units).encode()
    ).hexdigest()


def find_intervals(
    root: Path, spans: Sequence[Span], parts: Mapping[str, Any], units: Sequence[Any]
) -> dict[str, Interval]:
    """When each stage ran; a stage that left no sign of itself is not there."""
    found: dict[str, Interval] = {}
    manifests = {
        "capture": [m for key, m in parts.items() if key.startswith("activations/")],
        "gradients": [m for key, m in parts.items() if key.startswith("gradients/")],
        "compress": [
            {"finished_at": u["finished_at"], "seconds": sum(u["seconds"].values())} for u in units
        ],
    }
    seconds = read_report(root).get("stage_seconds", {})
    for stage in STAGES:
        tasks = [
            (s["start"], s["start"] + s["seconds"])
            for s in spans
            if (s["kind"], s["stage"]) == (TASK, stage)
        ]
        if not tasks and manifests.get(stage):
            tasks = [(m["finished_at"] - m["seconds"], m["finished_at"]) for m in manifests[stage]]
        if not tasks and stage in LEFT_BY and stage in seconds:
            ends = [path.stat().st_mtime for path in root.glob(LEFT_BY[stage])]
            tasks = [(max(ends) - seconds[stage], max(ends))] if ends else []
        if tasks:
            found[stage] = Interval(min(start for start, _ in tasks), max(end for _, end in tasks))
    return found


def describe_interval(
    interval: Interval, spans: Iterable[Span], busy: Iterable[tuple[float, float]], begun: float
) -> dict[str, Any]:
    """Seconds of an interval, the share of them in which GPUs were busy (None without any), and
    seconds and bytes of spans by kind. begun: Unix time that `start_s` counts from."""
    seconds: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for span in spans:
        seconds[span["kind"]] += span["seconds"]
        num_bytes[span["kind"]] += span["bytes"]
    samples = [share for at, share in busy if interval.start <= at <= interval.end]
    return {
        "start_s": round(interval.start - begun, 2),
        "seconds": round(interval.end - interval.start, 2),
        "gpu_busy": round(mean(samples), 3) if samples else None,
        "host_seconds": {kind: round(value, 2) for kind, value in sorted(seconds.items())},
        "bytes": {kind: value for kind, value in sorted(num_bytes.items()) if value},
    }


def describe_units(units: Sequence[Mapping[str, Any]], num_workers: int) -> dict[str, Any]:
    """Seconds a unit by phase and what lies between them; empty without units.

    A unit is fetched beside the computation of the one before, and written beside the next: "fetch"
    is the time in which its worker waited for it with nothing to compute. The gap is what a worker
    spends on neither, on average: from the first unit's beginning to the last one's end, times the
    workers, less what they computed.
    """
    if not units:
        return {}
    done = sorted(units, key=lambda unit: float(unit["finished_at"]))
    phases: dict[str, list[float]] = {}
    for unit in done:
        for phase, seconds in unit["seconds"].items():
            phases.setdefault(phase, []).append(seconds)
    computed = sum(
        sum(values) for phase, values in phases.items() if phase not in ("fetch", "write")
    )
    lasted = done[-1]["finished_at"] - min(
        u["finished_at"] - sum(u["seconds"].values()) for u in done
    )
    ends = [unit["finished_at"] for unit in done]
    between = [later - sooner for sooner, later in pairwise(ends)]
    peaks: dict[str, int] = {}
    for unit in done:
        for phase, num_bytes in unit.get("peak_gpu_bytes", {}).items():
            peaks[phase] = max(num_bytes, peaks.get(phase, 0))
    return {
        "count": len(done),
        "mean_seconds": {
            phase: round(sum(values) / len(done), 3) for phase, values in phases.items()
        },
        "max_seconds": {phase: round(max(values), 3) for phase, values in phases.items()},
        "fetch_over_computed": (
            round(sum(phases.get("fetch", [])) / computed, 4) if computed else None
        ),
        "gap_seconds": round((num_workers * lasted - computed) / len(done), 3),
        "between_ends_seconds": (
            {"mean": round(mean(between), 3), "max": round(max(between), 3)} if between else None
        ),
        "per_minute": round(60 * len(done) / lasted, 3) if lasted > 0 else None,
        "peak_gpu_bytes": peaks,
    }


def plan_figures(config: RunConfig) -> dict[str, float]:
    """What the plan of a run says it will take: every field of the estimate that is in bytes,
    seconds or hours, by its name."""
    prepared = prepare(config)
    return dict(
        figures_of(estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards))
    )


def figures_of(value: Any, name: str = "") -> Iterable[tuple[str, float]]:
    """(name, figure) of a dataclass or mapping and what lies in it; names of inner ones are joined
    with a dot."""
    if is_dataclass(value):
        inner = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, Mapping):
        inner = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, int | float) and name.endswith(PLANNED):
        yield name, value
        return
    else:
        return
    for key, item in inner:
        yield from figures_of(item, f"{name}.{key}" if name else key)


def actual_figures(
    facts: Mapping[str, Any], watch: Watch, units: Sequence[Mapping[str, Any]], source: Path
) -> dict[str, float]:
    """The same names as a plan's, as far as a run can tell: seconds of stages, bytes by folder of
    the run root."""
    written = bytes_by_folder(watch, DATA)
    stages = facts["stages"]
    found: dict[str, float] = {f"{stage}_seconds": s["seconds"] for stage, s in stages.items()}
    found |= {"total_seconds": facts["job"]["seconds"], "wall_seconds": facts["job"]["seconds"]}
    found |= {name: written[folder] for name, folder in FOLDERS.items()}
    found["gradient_bytes"] = written["gradients"] + written["residual-gradients"]
    found["untouched_bytes"] = written["checkpoint"] - written["units"]
    found["source_bytes"] = sum(size for path, size in files_under(source) if path.endswith(DATA))
    found["peak_stored_bytes"] = watch.peaks.run_root_bytes
    streams = [s for name, s in stages.items() if name in ("capture", "gradients", "propagate")]
    if streams:
        found["start_seconds"] = min(s["start_s"] for s in streams)
        found["stream_seconds"] = (
            max(s["start_s"] + s["seconds"] for s in streams) - found["start_seconds"]
        )
    if "compress" in stages:
        found["unit_seconds"] = stages["compress"]["seconds"]
    found["job_seconds"] = facts["job"]["seconds"]
    computed = [
        s for u in units for phase, s in u["seconds"].items() if phase not in ("fetch", "write")
    ]
    found["solver_gpu_seconds"] = sum(computed)
    for name, chosen in {"stream": ("capture", "gradients"), "unit": ("compress",)}.items():
        read = [
            stages[s]["bytes"]["read"]
            for s in chosen
            if s in stages and "read" in stages[s]["bytes"]
        ]
        if read:
            found[f"{name}_read_bytes"] = sum(read)
    return found


def bytes_by_folder(watch: Watch, suffixes: tuple[str, ...] = ("",)) -> Counter[str]:
    """Of every object that was seen in the run root with such an end to its name, by its first
    folder."""
    written: Counter[str] = Counter()
    for key, size_bytes in watch.objects.items():
        written[key.split("/")[0]] += size_bytes * key.endswith(suffixes)
    return written


def compare(planned: Mapping[str, float], actual: Mapping[str, float]) -> list[dict[str, Any]]:
    """Side by side, by name; `actual` is None where the run does not tell. Hours become seconds."""
    rows = []
    for name, value in planned.items():
        last = name.split(".")[-1]
        if last.endswith("_hours"):
            last, value = last.removesuffix("_hours") + "_seconds", 3600 * value
        whole = "_".join([*name.split(".")[:-1], last])
        rows.append(
            {"name": whole, "planned": value, "actual": actual.get(whole, actual.get(last))}
        )
    return rows


def describe_job(
    root: Path, trace: Path, watch: Watch, lasted: Interval, num_workers: int
) -> dict[str, Any]:
    """Everything but the plan. lasted: from the start of the job's process to its end."""
    spans, units = read_spans(trace), read_units(root)
    intervals = find_intervals(root, spans, watch.parts, units)
    return {
        "job": describe_interval(lasted, spans, watch.busy, lasted.start),
        "stages": {
            stage: describe_interval(
                i, [s for s in spans if s["stage"] == stage], watch.busy, lasted.start
            )
            for stage, i in intervals.items()
        },
        "peaks": asdict(watch.peaks),
        "units": describe_units(units, num_workers),
        "objects_bytes": dict(sorted(bytes_by_folder(watch).items())),
        "report_seconds": read_report(root).get("stage_seconds", {}),
        "quality": read_report(root).get("quality"),
        "unit_digests": {u["unit"]: u["sha256"] for u in units},
        "digest": digest_units(units),
    }
