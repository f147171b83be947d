"""report.json of a small run: every figure counted again from the run root."""

import io
import json
import math
from collections import Counter

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from p48ray.numerics.zeros import ZERO_INPUTS
from p48ray.report.report import (
    Report,
    build_report,
    few_tokens,
    print_report,
    zero_layer_words,
)
from p48ray.report.work import Extrapolation
from p48ray.run.manifest import LinearRecord, UnitManifest
from p48ray.run.plan import WorkUnit
from tests.stages.small_run import SmallRun

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def units_of(run: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(run.prepared.store, f"units/{u.id}/manifest.json")
        for u in run.prepared.plan.units
    ]


def rebuilt(run: SmallRun, units: list[UnitManifest]) -> Report:
    return build_report(run.context, units, run.prepared.shards, run.report.quality, {})


def with_records(unit: UnitManifest, **changes: object) -> UnitManifest:
    """Every linear of a unit with some fields changed."""
    records = tuple(r.model_copy(update=changes) for r in unit.linears)
    return unit.model_copy(update={"linears": records})


def test_report_in_the_run_root_is_the_one_returned(finished: SmallRun) -> None:
    data = (finished.root / "report" / "report.json").read_bytes()
    assert Report.from_json(data, "report.json") == finished.report


def test_report_says_what_was_made_and_how(finished: SmallRun) -> None:
    found, plan = finished.report, finished.prepared.plan
    assert (found.name, found.plan_digest) == ("tiny-kimi-k2.5-p48-nvfp4", plan.digest)
    assert (found.solver, found.sparsity, found.scale_span, found.activation_group) == (
        "block_descent",
        "paired-4:8",
        32,
        16,
    )
    assert (found.source, found.checkpoint) == (
        str(finished.source),
        f"{finished.root}/checkpoint/",
    )
    assert found.calibration_tokens == 6 * 64
    assert found.devices == {"cpu": len(plan.units)}
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"p48ray", "torch", "transformers", "compressed-tensors"}


def test_errors_and_outcomes_are_those_of_the_manifests(finished: SmallRun) -> None:
    records = [r for unit in units_of(finished) for r in unit.linears]
    assert finished.report.num_linears == len(records) == 192
    assert finished.report.outcomes == Counter(r.outcome for r in records)
    for projection in PROJECTIONS:
        own = {
            r.name: r.relative_output_error for r in records if r.name.endswith(f".{projection}")
        }
        found = finished.report.relative_output_error[projection]
        assert found.mean == pytest.approx(sum(own.values()) / 64)
        assert found.worst == max(own.values()) == own[found.worst_linear]
        assert 0 < found.mean < found.worst < 1


def test_sizes_are_those_of_the_files(finished: SmallRun) -> None:
    def num_bytes(folder: str, only: str = "") -> int:
        files = sorted(
            (finished.root if folder == "checkpoint" else finished.source.parent).glob(
                f"{folder}/*.safetensors"
            )
        )
        return sum(
            t.nbytes for file in files for name, t in load_file(file).items() if only in name
        )

    assert finished.report.checkpoint_bytes == num_bytes("checkpoint")
    assert finished.report.source_bytes == num_bytes("source")
    assert finished.report.expert_bytes == num_bytes("checkpoint", only=".mlp.experts.")


def test_clipping_is_the_mean_over_units(finished: SmallRun) -> None:
    units = units_of(finished)
    first = units[0].model_copy(
        update={"clipped_input_share": 0.4, "clipped_intermediate_share": 0.8}
    )
    found = rebuilt(
        finished,
        [
            first,
            *(
                u.model_copy(update={"clipped_input_share": 0.0, "clipped_intermediate_share": 0.0})
                for u in units[1:]
            ),
        ],
    )
    assert found.clipped_input_share == pytest.approx(0.4 / len(units))
    assert found.clipped_intermediate_share == pytest.approx(0.8 / len(units))


def test_experts_are_counted_by_their_tokens(finished: SmallRun) -> None:
    """None; few, under a quarter of the average; all others."""
    few = few_tokens(finished.prepared.plan)
    units = units_of(finished)
    changed = [
        with_records(units[0], tokens=0),
        with_records(units[1], tokens=1),
        with_records(units[2], tokens=few - 1),
    ]
    changed += [with_records(unit, tokens=few) for unit in units[3:]]
    found = rebuilt(finished, changed)
    assert (found.experts_without_tokens, found.experts_with_few_tokens, found.few_tokens) == (
        8,
        16,
        few,
    )


def test_few_tokens_are_a_quarter_of_the_plan_s_average(finished: SmallRun) -> None:
    """Of the shipped configuration for Kimi-K2.5: 512 x 4096 tokens, 8 of 384 experts each, are
    43,690 on average."""
    plan = finished.prepared.plan
    tokens = plan.config.calibration.model_copy(
        update={"num_sequences": 512, "sequence_length": 4096}
    )
    source = plan.source.model_copy(update={"top_k": 8, "num_experts": 384})
    kimi = plan.model_copy(
        update={"source": source, "config": plan.config.model_copy(update={"calibration": tokens})}
    )
    assert few_tokens(kimi) == 10_923
    c = plan.config.calibration
    average = c.num_sequences * c.sequence_length * plan.source.top_k / plan.source.num_experts
    assert few_tokens(plan) == math.ceil(average / 4)


def test_experts_that_fell_back_are_counted(finished: SmallRun) -> None:
    units = units_of(finished)
    found = rebuilt(
        finished,
        [
            with_records(units[0], outcome="round_to_nearest", reason="the Hessian is zero"),
            *units[1:],
        ],
    )
    assert found.outcomes["round_to_nearest"] == 24
    assert sum(found.outcomes.values()) == 192


def test_layers_of_zeros_are_named_and_others_are_not(finished: SmallRun) -> None:
    units = units_of(finished)

    def zeroed(unit: UnitManifest, projections: tuple[str, ...]) -> UnitManifest:
        records = tuple(
            r.model_copy(update={"outcome": "zero", "reason": ZERO_INPUTS})
            if r.name.endswith(projections)
            else r
            for r in unit.linears
        )
        return unit.model_copy(update={"linears": records})

    kinds = {1: ("gate_proj", "up_proj", "down_proj"), 2: ("down_proj",)}
    changed = [zeroed(u, kinds.get(WorkUnit.layer_of(u.unit), ("none",))) for u in units]
    found = rebuilt(finished, changed)
    assert (found.zero_inputs, found.zero_intermediates) == ((1,), (1, 2))
    assert zero_layer_words(found) == [
        "Layers whose experts' inputs are all zero: 1. The activation scale of gate and up is 1"
        " there.",
        "Layers whose intermediates are all zero: 1, 2. The activation scale of down is 1 there.",
    ]
    partly = rebuilt(finished, [zeroed(units[0], ("down_proj",)), *units[1:]])
    assert partly.outcomes["zero"] == 8 and zero_layer_words(partly) == []
    assert zero_layer_words(finished.report) == []


def test_seconds_of_units_are_summed_by_phase_and_stages_are_the_drivers(
    finished: SmallRun,
) -> None:
    units = [
        u.model_copy(update={"seconds": {"fetch": 0.25, "solve": 1.0}}) for u in units_of(finished)
    ]
    found = rebuilt(finished, units)
    assert found.unit_seconds == {"fetch": 2.0, "solve": 8.0}
    assert set(finished.report.stage_seconds) == {
        "scan",
        "capture",
        "compress",
        "reduce",
        "verify",
        "evaluate",
        "total",
    }


def test_quality_is_that_of_the_evaluation_parts(finished: SmallRun) -> None:
    (folder,) = (finished.root / "evaluation").iterdir()
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("part-*.json"))]
    cells = [cell for part in parts for cell in part["cells"]]
    found = finished.report.quality
    assert found is not None
    assert found.num_tokens == sum(c["num_tokens"] for c in cells) == 3 * 64
    assert found.kl == pytest.approx(sum(c["kl"] for c in cells) / 192)
    assert found.compressed_accuracy == pytest.approx(
        sum(c["compressed_correct"] for c in cells) / 192
    )
    assert 1 < found.source_perplexity < 2048 and found.compressed_perplexity > 1 and found.kl > 0


def printed(report: Report) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=160))
    return out.getvalue()


def test_printed_report_has_quality_errors_outcomes_sizes_and_the_place(finished: SmallRun) -> None:
    text, found = printed(finished.report), finished.report
    assert found.quality is not None
    quality = (
        found.quality.source_perplexity,
        found.quality.compressed_perplexity,
        found.quality.kl,
    )
    for words in [f"{value:.4f}" for value in quality] + [
        f"{e.mean:.4f}" for e in found.relative_output_error.values()
    ]:
        assert words in text
    for words in (
        "192 linears: 192 solved",
        f"size: {found.checkpoint_bytes:,} bytes",
        f"checkpoint: {found.checkpoint}",
        "192 held-out tokens",
    ):
        assert words in text


def test_printed_report_of_a_run_without_evaluation_shows_no_quality(finished: SmallRun) -> None:
    text = printed(finished.report.model_copy(update={"quality": None}))
    assert "perplexity" not in text
    assert "192 linears" in text


def test_linear_records_stay_within_what_a_report_can_fold(finished: SmallRun) -> None:
    records: list[LinearRecord] = [r for unit in units_of(finished) for r in unit.linears]
    assert all(0 <= r.shrinkage <= 1 and 0 < r.damp <= 0.1 and r.tokens >= 0 for r in records)


# A pilot's.


PILOT = Extrapolation(
    layers=2, of_layers=60, worker_hours=26.5, wall_hours=0.25, gpu_hours=26.5, cost=1234.5
)


def test_printed_report_of_a_pilot_says_what_all_layers_would_take_and_names_no_checkpoint(
    finished: SmallRun,
) -> None:
    text = printed(finished.report.model_copy(update={"quality": None, "pilot": PILOT}))
    words = (
        "pilot of 2 layers, no checkpoint; all 60 would take 26 h 30 min of workers' time, 26.5"
        " GPU-hours, 1,234.50 at the configured price"
    )
    assert f"{words}, 15 min 00 s with the configured workers and none idle" in text
    assert "checkpoint: " not in text


def test_printed_report_of_a_pilot_on_cpus_speaks_of_no_gpus_and_no_price(
    finished: SmallRun,
) -> None:
    text = printed(
        finished.report.model_copy(
            update={"pilot": PILOT.model_copy(update={"gpu_hours": 0.0, "cost": None})}
        )
    )
    assert "26 h 30 min of workers' time, 15 min 00 s with" in text


def test_whole_runs_report_extrapolates_nothing(finished: SmallRun) -> None:
    assert finished.report.pilot is None
    assert "pilot" not in printed(finished.report)
