"""jobs/publish.py --require: what a checkpoint has to be worth, by the run's own figures."""

import shutil
from pathlib import Path

import pytest

from p48ray.config.benchmarks import BenchmarkTask
from p48ray.errors import ConfigError, RequirementError
from p48ray.finished.own_figures import OwnFigures
from p48ray.finished.requirements import check_requirements, parse_requirement
from p48ray.report.report import Report
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkColumn, BenchmarkTable
from p48ray.stages.evaluate import CompressedQuality, EvaluationResult
from p48ray.store import LocalStore
from tests.finished.publish_command import checkpoint_files, invoke_publish, published
from tests.jobs.command import HELD_OUT, ROUNDED, arguments, invoke
from tests.servers.hub import Hub

QUALITY = EvaluationResult(
    num_tokens=192,
    source_perplexity=7.0,
    source_accuracy=0.57,
    compressed_perplexity=8.125,
    compressed_accuracy=0.5,
    kl=0.0625,
    in_groups_of_32=CompressedQuality(perplexity=8.25, accuracy=0.4375, kl=0.125),
)
TASKS = tuple(BenchmarkTask(task=name, shots=5, metric="acc") for name in ("arc", "mmlu"))


def table_of(
    base: dict[str, float], ours: dict[str, float], limit: int | None = None
) -> BenchmarkTable:
    return BenchmarkTable(
        tasks=TASKS,
        columns=(
            BenchmarkColumn(role="base", title="base", values=base),
            BenchmarkColumn(role="ours", title="ours", values=ours),
        ),
        limit=limit,
    )


TABLE = table_of({"arc": 80.0, "mmlu": 60.0}, {"arc": 76.0, "mmlu": 60.0})
FIGURES = OwnFigures(QUALITY, TABLE)


def check(text: str, figures: OwnFigures = FIGURES) -> None:
    check_requirements([parse_requirement(text)], figures)


@pytest.mark.parametrize(
    "text",
    [
        "kl<=0.0625",
        "kl>=0.0625",
        " kl < 0.12 ",
        "kl<=1e-1",
        "perplexity<=8.125",
        "accuracy>0.49",
        "kl_in_groups_of_32<=0.125",
        "perplexity_in_groups_of_32<8.3",
        "accuracy_in_groups_of_32>=0.4375",
        "recovery>=0.97",
        "recovery.arc>=0.95",
        "benchmark.arc>=0.76",
    ],
)
def test_what_is_met_passes(text: str) -> None:
    check(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kl<0.0625", "kl is 0.0625"),
        ("kl>0.0625", "kl is 0.0625"),
        ("perplexity<=8", "perplexity is 8.125"),
        ("kl_in_groups_of_32<=0.1", "kl_in_groups_of_32 is 0.125"),
        ("recovery>=0.98", "recovery is 0.971429"),
        ("recovery.arc>=0.96", "recovery.arc is 0.95"),
        ("benchmark.arc>=0.77", "benchmark.arc is 0.76"),
        ("recovery.gsm8k>=0.1", "recovery.gsm8k is missing: it was not measured"),
    ],
)
def test_what_is_not_met_is_named_with_what_was_found(text: str, said: str) -> None:
    with pytest.raises(RequirementError) as caught:
        check(text)
    assert f"  {text}: {said}" in str(caught.value)


MISSING = {
    "no evaluation": ("kl<=1", OwnFigures(None, TABLE), "has no evaluation"),
    "no groups": (
        "kl_in_groups_of_32<=1",
        OwnFigures(QUALITY.model_copy(update={"in_groups_of_32": None})),
        "groups of 32",
    ),
    "no benchmarks": ("recovery>=0", OwnFigures(QUALITY), "has no benchmarks"),
    "no base": ("recovery.arc>=0", OwnFigures(None, table_of({}, {"arc": 76.0})), "of the base"),
    "some tasks": (
        "recovery>=0",
        OwnFigures(None, table_of({"arc": 80.0, "mmlu": 60.0}, {"arc": 76.0})),
        "only 1 of 2 tasks",
    ),
    "a trial": (
        "benchmark.arc>=0",
        OwnFigures(None, table_of({"arc": 80.0}, {"arc": 76.0}, limit=10)),
        "trial of at most 10",
    ),
    "no number": (
        "kl<=1",
        OwnFigures(QUALITY.model_copy(update={"kl": float("nan")})),
        "kl is nan",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_was_not_measured_is_not_met(case: str) -> None:
    text, figures, said = MISSING[case]
    with pytest.raises(RequirementError, match=said):
        check(text, figures)


def test_all_that_is_not_met_is_listed() -> None:
    requirements = [parse_requirement(t) for t in ("kl<0", "accuracy>0", "recovery>1")]
    with pytest.raises(RequirementError, match="2 of 3 not met") as caught:
        check_requirements(requirements, FIGURES)
    assert "kl<0: " in str(caught.value) and "recovery>1: " in str(caught.value)


MALFORMED = ["", "kl", "kl=0.1", "kl<=", "kl<=abc", "kl<=nan", "kl<=inf", "kll<=0.1", "recovery.>1"]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_requirement_is_the_users_mistake(text: str) -> None:
    with pytest.raises(ConfigError, match="--require"):
        parse_requirement(text)


# The command.


@pytest.fixture(scope="session")
def evaluated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has looked at held-out text. Not to be changed."""
    root = tmp_path_factory.mktemp("to-require") / "run"
    outcome = invoke(*arguments(root, ROUNDED | {"evaluation": HELD_OUT}))
    assert outcome.code == 0, outcome
    return root


@pytest.fixture
def evaluated(evaluated_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated_once, tmp_path / "run")


def measured_kl(root: Path) -> float:
    quality = Report.load(LocalStore(root), run_root.REPORT).quality
    assert quality is not None
    return quality.kl


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["publish", "dry"])
def test_what_is_not_good_enough_is_not_sent(
    evaluated: Path, hub: Hub, args: tuple[str, ...]
) -> None:
    kl = measured_kl(evaluated)
    assert kl > 0
    outcome = invoke_publish(evaluated, hub, "--require", f"kl<={kl * 0.99}", *args)
    assert outcome.code == 1 and f"kl is {kl:.6g}" in outcome.err, outcome
    assert not hub.requests
    good = ("--require", f"kl<={kl * 1.01}")
    outcome = invoke_publish(evaluated, hub, *good, "--require", "recovery>=0.9", *args)
    assert outcome.code == 1 and "recovery is missing" in outcome.err, outcome
    assert not hub.requests
    assert invoke_publish(evaluated, hub, *good).code == 0
    assert published(hub) == checkpoint_files(evaluated)


def test_malformed_requirement_ends_with_2(root: Path, hub: Hub) -> None:
    outcome = invoke_publish(root, hub, "--require", "kl=0.1")
    assert outcome.code == 2 and "'kl<=0.12'" in outcome.err and not hub.requests


def test_figures_of_another_plan_do_not_count(evaluated: Path, hub: Hub) -> None:
    """As where the report was left from before."""
    store = LocalStore(evaluated)
    report = Report.load(store, run_root.REPORT)
    store.put(run_root.REPORT, report.model_copy(update={"plan_digest": "0" * 64}).to_json())
    outcome = invoke_publish(evaluated, hub, "--require", "kl<=100")
    assert outcome.code == 1 and "has no evaluation of this checkpoint" in outcome.err
