"""What is read from a run root, a trace and a watch: with spans, without, and from those of killed
processes."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.job import make_source, parse
from bench.job_report import (
    Interval,
    compare,
    describe_interval,
    describe_units,
    digest_units,
    figures_of,
    find_intervals,
    read_spans,
)
from bench.job_watch import Watch, open_gpus


def span(
    kind: str, stage: str, start: float, seconds: float, num_bytes: int = 0
) -> dict[str, object]:
    return {
        "kind": kind,
        "stage": stage,
        "start": start,
        "seconds": seconds,
        "bytes": num_bytes,
        "thread": 1,
        "what": "",
    }


def unit(name: str, finished_at: float, **seconds: float) -> dict[str, object]:
    return {
        "unit": name,
        "sha256": f"of {name}",
        "finished_at": finished_at,
        "seconds": seconds,
        "peak_gpu_bytes": {"solve": len(name)},
    }


def test_cut_last_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps(span("task", "capture", 1.0, 2.0))
    (tmp_path / "1.jsonl").write_text(f"{whole}\n{whole[:20]}")
    (tmp_path / "2.jsonl").write_text(f"{whole}\n")
    assert read_spans(tmp_path) == [json.loads(whole)] * 2


def test_stages_by_spans_where_there_are_some_and_by_manifests_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(
        json.dumps({"stage_seconds": {"verify": 3.0, "reduce": 1.0, "total": 9.0}})
    )
    (tmp_path / "verification").mkdir()
    verdict = tmp_path / "verification" / "model.json"
    verdict.write_text("{}")
    os.utime(verdict, (60.0, 60.0))
    spans = [
        span("task", "capture", 10.0, 5.0),
        span("task", "capture", 12.0, 8.0),
        span("write", "capture", 0.0, 99.0),
    ]
    parts = {
        "activations/x": {"finished_at": 1.0, "seconds": 1.0},
        "gradients/x": {"finished_at": 30.0, "seconds": 4.0},
    }
    found = find_intervals(tmp_path, spans, parts, [unit("a", 50.0, fetch=1.0, solve=9.0)])
    assert found == {
        "capture": Interval(10.0, 20.0),
        "gradients": Interval(26.0, 30.0),
        "compress": Interval(40.0, 50.0),
        "verify": Interval(57.0, 60.0),
    }


def test_interval_sums_kinds_and_means_samples_within() -> None:
    spans = [
        span("write", "capture", 1.0, 0.5, 100),
        span("write", "capture", 1.0, 0.25, 50),
        span("task", "capture", 1.0, 3.0),
    ]
    found = describe_interval(Interval(1.0, 4.0), spans, [(0.5, 1.0), (1.5, 0.5), (3.0, 1.0)], 0.0)
    assert found == {
        "start_s": 1.0,
        "seconds": 3.0,
        "gpu_busy": 0.75,
        "host_seconds": {"task": 3.0, "write": 0.75},
        "bytes": {"write": 150},
    }
    assert describe_interval(Interval(5.0, 6.0), [], [], 0.0)["gpu_busy"] is None


def test_units_rate_gap_and_fetch() -> None:
    """Two units of 10 s of computation each by one worker, in 23 s from the fetch of the first to
    the end of the last."""
    found = describe_units(
        [
            unit("b", 32.0, fetch=0.0, solve=10.0, write=3.0),
            unit("a", 20.0, fetch=1.0, solve=9.0, refine=1.0),
        ],
        1,
    )
    assert found["count"] == 2
    assert found["mean_seconds"]["solve"] == 9.5
    assert found["max_seconds"]["fetch"] == 1.0
    assert found["fetch_over_computed"] == 0.05
    assert found["between_ends_seconds"] == {"mean": 12.0, "max": 12.0}
    assert found["per_minute"] == pytest.approx(60 * 2 / 23, abs=1e-3)
    assert found["gap_seconds"] == 1.5
    assert describe_units([], 1) == {}


def test_digest_is_of_names_and_bytes() -> None:
    one, two = unit("a", 1.0), unit("b", 2.0)
    assert digest_units([one, two]) == digest_units([one | {"finished_at": 9.0}, two])
    assert digest_units([one, two]) != digest_units([one, two | {"sha256": "other"}])


@dataclass
class Inner:
    seconds: float = 2.0
    wait_seconds: float = 3.0


@dataclass
class Outer:
    tokens: int = 5
    unit_bytes: int = 7
    stream_gpu_hours: float = 0.5
    capture: Inner = field(default_factory=Inner)
    stages: dict[str, float] = field(default_factory=lambda: {"reduce_seconds": 4.0})


def test_plan_takes_every_field_of_bytes_seconds_and_hours() -> None:
    planned = dict(figures_of(Outer()))
    assert planned == {
        "unit_bytes": 7,
        "stream_gpu_hours": 0.5,
        "capture.wait_seconds": 3.0,
        "stages.reduce_seconds": 4.0,
    }
    rows = {
        row["name"]: row
        for row in compare(
            planned, {"unit_bytes": 8, "stream_gpu_seconds": 900.0, "reduce_seconds": 5.0}
        )
    }
    assert (rows["unit_bytes"]["planned"], rows["unit_bytes"]["actual"]) == (7, 8)
    assert (rows["stream_gpu_seconds"]["planned"], rows["stream_gpu_seconds"]["actual"]) == (
        1800.0,
        900.0,
    )
    assert rows["stages_reduce_seconds"]["actual"] == 5.0
    assert rows["capture_wait_seconds"]["actual"] is None


def test_watch_remembers_what_is_gone(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    layer = tmp_path / "activations" / "layer-001"
    layer.mkdir(parents=True)
    (layer / "part-0000.arrow").write_bytes(b"1234567890")
    (layer / "part-0000.json").write_text('{"seconds": 1}')
    (layer / "scales.json").write_text("{}")
    (layer / ".tmp-1").write_bytes(b"123")
    watch.look_at_root()
    for path in layer.iterdir():
        path.unlink()
    watch.look_at_root()
    assert watch.objects["activations/layer-001/part-0000.arrow"] == 10
    assert watch.parts == {"activations/layer-001/part-0000.json": {"seconds": 1}}
    assert watch.peaks.run_root_bytes == 10 + 14 + 2 + 3
    assert not any(key.endswith(".tmp-1") for key in watch.objects)


def test_watch_means_utilization_over_gpus_and_keeps_the_largest_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML in miniature: two devices, one of which is busy."""
    figures = {0: (100, 5), 1: (50, 7)}
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=figures[gpu][0]),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=figures[gpu][1]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    module, gpus = open_gpus()
    assert gpus == [0, 1]
    watch = Watch(tmp_path)
    watch.look_at_gpus(module, gpus)
    assert [share for _, share in watch.busy] == [0.75]
    assert watch.peaks.gpu_bytes == 7


def test_source_of_other_sizes_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text("{}")
    with pytest.raises(SystemExit, match="expected a source of"):
        make_source(parse(["--width=small", "--keep-source"]), tmp_path)
