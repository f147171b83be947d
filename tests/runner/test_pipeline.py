"""Linears that could only be rounded: how many a checkpoint may have
(compression.max_fallback_share)."""

import pytest

from p48ray.errors import StageFailedError
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.run.plan import RunPlan
from p48ray.runner.pipeline import check_fallbacks
from tests.stages.small_run import SmallRun

NUM_LINEARS = 192


def with_settings(plan: RunPlan, **settings: object) -> RunPlan:
    """The same plan with other settings of `compression`."""
    config = plan.config.model_copy(
        update={"compression": plan.config.compression.model_copy(update=settings)}
    )
    return plan.model_copy(update={"config": config})


def rounded(finished: SmallRun, count: int) -> list[UnitManifest]:
    """The finished run's unit manifests, of whose linears the first `count` say that they were
    rounded."""
    found, left = [], count
    for unit in finished.prepared.plan.units:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        linears = tuple(
            r.model_copy(
                update=(
                    {"outcome": "round_to_nearest", "reason": "no tokens"}
                    if i < left
                    else {"outcome": "solved"}
                )
            )
            for i, r in enumerate(manifest.linears)
        )
        left -= min(left, len(linears))
        found.append(manifest.model_copy(update={"linears": linears}))
    return found


@pytest.mark.parametrize(
    ("share", "most"), [(0.0, 0), (1 / NUM_LINEARS, 1), (0.01, 1), (0.5, NUM_LINEARS // 2)]
)
def test_share_that_is_allowed_passes_and_one_linear_more_is_refused(
    finished: SmallRun, share: float, most: int
) -> None:
    plan = with_settings(finished.prepared.plan, max_fallback_share=share)
    check_fallbacks(plan, rounded(finished, most))
    expected = (
        f"compress: {most + 1} of {NUM_LINEARS} linears fell back to rounding, more than"
        f" compression.max_fallback_share = {share:g} allows: "
    )
    with pytest.raises(StageFailedError) as caught:
        check_fallbacks(plan, rounded(finished, most + 1))
    assert str(caught.value).startswith(expected)
    assert caught.value.args[0].count(": no tokens") == min(3, most + 1)
    assert "experts.0.gate_proj: no tokens" in str(caught.value)


def test_linears_that_are_zero_count_for_nothing(finished: SmallRun) -> None:
    units = rounded(finished, NUM_LINEARS // 2)
    zero = {"outcome": "zero", "reason": "its weights are zero"}
    spared = [
        unit.model_copy(
            update={
                "linears": tuple(
                    r if r.outcome == "round_to_nearest" else r.model_copy(update=zero)
                    for r in unit.linears
                )
            }
        )
        for unit in units
    ]
    plan = finished.prepared.plan
    with pytest.raises(StageFailedError, match=f"{NUM_LINEARS // 2} of {NUM_LINEARS // 2} linears"):
        check_fallbacks(with_settings(plan, max_fallback_share=0.9), spared)
    gone = [
        unit.model_copy(update={"linears": tuple(r.model_copy(update=zero) for r in unit.linears)})
        for unit in units
    ]
    check_fallbacks(with_settings(plan, max_fallback_share=0.0), gone)


def test_rounding_that_was_asked_for_is_no_fallback(finished: SmallRun) -> None:
    plan = with_settings(finished.prepared.plan, max_fallback_share=0.0, solver="round_to_nearest")
    check_fallbacks(plan, rounded(finished, NUM_LINEARS))


def test_all_may_fall_back_where_the_share_is_one(finished: SmallRun) -> None:
    check_fallbacks(
        with_settings(finished.prepared.plan, max_fallback_share=1.0),
        rounded(finished, NUM_LINEARS),
    )
