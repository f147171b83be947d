"""Benchmarks without processes: what is read from the harness, and what becomes of figures in the
table."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p48ray.config.benchmarks import (
    LEADERBOARD,
    BenchmarksConfig,
    BenchmarkTask,
    ComparedCheckpoint,
)
from p48ray.errors import ConfigError, StageFailedError
from p48ray.run import run_root
from p48ray.run.benchmark_results import (
    BenchmarkColumn,
    BenchmarkResult,
    BenchmarkTable,
    build_table,
    identify,
    read_figures,
    read_harness,
    read_table,
    result_digest,
    table_notes,
    table_rows,
)
from p48ray.store import MemoryStore
from p48ray.store.view import SubStore
from tests.run.recorded_harness import GROUP, SINGLE

ENDINGS = BenchmarkTask(task="endings", title="Endings", shots=1, metric="acc_norm")
GROUPED = BenchmarkTask(task="group", shots=1, metric="acc")
THIRD = BenchmarkTask(task="third", shots=0, metric="exact_match", filter="strict-match")
CONFIG = BenchmarksConfig(tasks=(ENDINGS, GROUPED, THIRD), limit=None, max_length=512)


def table_of(**values: dict[str, float]) -> BenchmarkTable:
    """role=figures; every column is there, with none where none are given."""
    columns = (
        BenchmarkColumn(role=role, title=role, values=values.get(role, {}))
        for role in ("base", "baseline", "ours")
    )
    return BenchmarkTable(tasks=CONFIG.tasks, columns=tuple(columns))


# The leaderboard.


def test_default_tasks_are_the_leaderboards() -> None:
    expected = [
        ("arc_challenge", 25, "acc_norm", "none"),
        ("hellaswag", 10, "acc_norm", "none"),
        ("mmlu", 5, "acc", "none"),
        ("truthfulqa_mc2", 0, "acc", "none"),
        ("winogrande", 5, "acc", "none"),
        ("gsm8k", 5, "exact_match", "strict-match"),
    ]
    assert [(t.task, t.shots, t.metric, t.filter) for t in BenchmarksConfig().tasks] == expected
    assert BenchmarksConfig().tasks == LEADERBOARD


# The table's arithmetic.


def test_delta_is_in_points_and_recovery_in_per_cent_of_the_base() -> None:
    first, second, third, mean = table_rows(
        table_of(
            base={"endings": 80.0, "group": 50.0, "third": 20.0},
            baseline={"endings": 60.0, "group": 30.0, "third": 0.0},
            ours={"endings": 72.0, "group": 51.0, "third": 5.0},
        )
    )
    assert (first.label, first.setting, first.baseline) == ("Endings", "1-shot acc_norm", 60.0)
    assert (first.delta, first.recovery) == pytest.approx((-8.0, 90.0))
    assert (second.delta, second.recovery) == pytest.approx((1.0, 102.0))
    assert (third.setting, third.recovery) == (
        "0-shot exact_match (strict-match)",
        pytest.approx(25.0),
    )
    assert (mean.base, mean.baseline, mean.ours) == pytest.approx((50.0, 30.0, 128 / 3))
    assert (mean.delta, mean.recovery) == pytest.approx((128 / 3 - 50, 100 * 128 / 150))
    assert mean.setting == "of 3 of 3 tasks"


def test_average_is_over_what_every_column_with_figures_has() -> None:
    """The hard task that one column lacks would otherwise flatter it."""
    table = table_of(
        base={"endings": 80.0, "group": 50.0, "third": 20.0}, ours={"endings": 72.0, "group": 51.0}
    )
    *_, mean = table_rows(table)
    assert table.averaged == ("endings", "group")
    assert (mean.base, mean.ours) == pytest.approx((65.0, 61.5))
    assert mean.setting == "of 2 of 3 tasks"
    assert mean.baseline is None


def test_what_is_missing_stays_empty() -> None:
    rows = table_rows(table_of(ours={"endings": 72.0}))
    assert [(r.base, r.baseline, r.delta, r.recovery) for r in rows] == [(None,) * 4] * 4
    assert [r.ours for r in rows] == [72.0, None, None, 72.0]
    *_, mean = table_rows(table_of(base={"group": 50.0}, ours={"endings": 72.0}))
    assert (mean.base, mean.ours, mean.delta, mean.recovery, mean.setting) == (
        None,
        None,
        None,
        None,
        "of 0 of 3 tasks",
    )
    assert all(r.ours is None for r in table_rows(table_of()))


def test_base_of_zero_has_no_recovery() -> None:
    first, *_ = table_rows(table_of(base={"endings": 0.0}, ours={"endings": 1.0}))
    assert (first.delta, first.recovery) == (1.0, None)


def test_zero_is_a_figure_and_not_a_missing_one() -> None:
    *_, mean = table_rows(
        table_of(base={"endings": 80.0, "third": 20.0}, ours={"endings": 72.0, "third": 0.0})
    )
    assert (mean.base, mean.ours, mean.setting) == (50.0, 36.0, "of 2 of 3 tasks")


# What the harness wrote.


def test_result_is_the_harness_figure() -> None:
    found = read_harness(SINGLE, "abc", ENDINGS, CONFIG, "vllm 0.32.0")
    assert (found.value, found.stderr, found.num_samples) == (
        0.7083333333333334,
        0.09477598811252413,
        24,
    )
    assert (found.identity, found.task, found.shots, found.metric, found.filter) == (
        "abc",
        "endings",
        1,
        "acc_norm",
        "none",
    )
    assert (found.task_version, found.harness, found.server, found.limit, found.max_length) == (
        "3.0",
        "0.4.13",
        "vllm 0.32.0",
        None,
        512,
    )


def test_group_has_one_figure_over_the_samples_of_its_tasks() -> None:
    found = read_harness(GROUP, "abc", GROUPED, CONFIG, "")
    assert (found.value, found.num_samples, found.task_version) == (0.28125, 32, "2")
    nested = copy.deepcopy(GROUP)
    nested["group_subtasks"] = {"group": ["inner", "second"], "inner": ["endings"]}
    assert read_harness(nested, "abc", GROUPED, CONFIG, "").num_samples == 32


def test_error_bar_that_the_harness_does_not_give_is_none() -> None:
    output = copy.deepcopy(SINGLE)
    output["results"]["endings"]["acc_norm_stderr,none"] = "N/A"
    assert read_harness(output, "abc", ENDINGS, CONFIG, "").stderr is None


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda o: o["n-shot"].update(endings=0), StageFailedError, "expected 1 shots"),
        (
            lambda o: o["results"].clear(),
            StageFailedError,
            "expected it among the harness's results",
        ),
        (
            lambda o: o.update(lm_eval_version="0.4.9"),
            StageFailedError,
            "expected results of lm-evaluation-harness 0.4.13, found 0.4.9",
        ),
        (
            lambda o: o["results"]["endings"].pop("acc_norm,none"),
            ConfigError,
            r"expected one of its metrics and filters \['acc,none'\]",
        ),
    ],
)
def test_results_of_something_else_are_refused(
    change: Callable[[dict[str, Any]], object], kind: type[Exception], words: str
) -> None:
    output = copy.deepcopy(SINGLE)
    change(output)
    with pytest.raises(kind, match=words):
        read_harness(output, "abc", ENDINGS, CONFIG, "")


def test_parts_of_a_group_with_other_shots_are_refused() -> None:
    output = copy.deepcopy(GROUP)
    output["n-shot"]["second"] = 0
    with pytest.raises(StageFailedError, match="group: expected 1 shots in every part"):
        read_harness(output, "abc", GROUPED, CONFIG, "")


# What makes a result another one.


def test_result_belongs_to_checkpoint_task_and_settings() -> None:
    known = result_digest("abc", ENDINGS, CONFIG)
    assert (
        result_digest("abc", ENDINGS.model_copy(update={"title": "another word"}), CONFIG) == known
    )
    others = [
        result_digest("abd", ENDINGS, CONFIG),
        *(
            result_digest("abc", ENDINGS.model_copy(update=change), CONFIG)
            for change in ({"task": "x"}, {"shots": 2}, {"metric": "acc"}, {"filter": "x"})
        ),
        *(
            result_digest("abc", ENDINGS, CONFIG.model_copy(update=change))
            for change in ({"limit": 5}, {"max_length": 1024})
        ),
    ]
    assert len({known, *others}) == 8


def test_identity_is_of_the_config_and_of_p48ray_json_or_the_index() -> None:
    store = MemoryStore("identity")
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        identify(store)
    store.put("config.json", b"{}")
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        identify(store)
    store.put("model.safetensors.index.json", b"[]")
    assert identify(store) == hashlib.sha256(b"{}[]").hexdigest()
    store.put("p48ray.json", b"digests")
    assert identify(store) == hashlib.sha256(b"{}digests").hexdigest()
    store.put("config.json", b"{sparse}")
    assert identify(store) == hashlib.sha256(b"{sparse}digests").hexdigest()


# Published figures.


def figures_file(folder: Path, text: str) -> str:
    path = folder / "figures.yaml"
    path.write_text(text)
    return str(path)


def test_figures_are_read_with_their_source(tmp_path: Path) -> None:
    found = read_figures(
        figures_file(tmp_path, "source: a paper\nfigures: {endings: 71.5, third: 0.5}\n"),
        CONFIG.tasks,
        "key",
    )
    assert (found.source, found.figures) == ("a paper", {"endings": 71.5, "third": 0.5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("figures: {endings: 71.5}", "source: Field required"),
        ("source: ''\nfigures: {endings: 71.5}", "source: String should have at least 1 character"),
        ("source: a paper", "figures: Field required"),
        ("source: a paper\nfigures: {}", "figures: Dictionary should have at least 1 item"),
        (
            "source: a paper\nfigures: {endings: 715}",
            "figures.endings: Input should be less than or equal to 100, found 715",
        ),
        ("source: a paper\nfigures: {endings: .nan}", "figures.endings: "),
        (
            "source: a paper\nfigures: {endings: 0.715, third: 1}",
            "expected per cent, found none above 1",
        ),
        (
            "source: a paper\nfigures: {ending: 71.5}",
            r"expected tasks of the table \['endings', 'group', 'third'\], found \['ending'\]",
        ),
        (
            "source: a paper\nfigures: {endings: 71.5}\nmore: 1",
            "more: Extra inputs are not permitted",
        ),
        ("- a", r"\(whole file\)"),
        ("{", "not valid YAML"),
    ],
)
def test_figures_that_are_none_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_figures(figures_file(tmp_path, text), CONFIG.tasks, "benchmarks.base.figures")
    assert str(caught.value).startswith(f"benchmarks.base.figures: {tmp_path}/figures.yaml: ")


def test_figures_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key: .*/none.yaml: can not be read: No such file"):
        read_figures(str(tmp_path / "none.yaml"), CONFIG.tasks, "key")


# The table of a run root.


def put_result(
    store: MemoryStore, identity: str, config: BenchmarksConfig, server: str = "vllm 0.32.0"
) -> BenchmarkResult:
    result = read_harness(SINGLE, identity, ENDINGS, config, server)
    store.put(run_root.benchmark_result(result_digest(identity, ENDINGS, config)), result.to_json())
    return result


def test_table_has_results_and_figures_and_empty_places(tmp_path: Path) -> None:
    figures = figures_file(tmp_path, "source: a paper\nfigures: {endings: 80, group: 50}\n")
    config = CONFIG.model_copy(
        update={"base": ComparedCheckpoint(title="the source", figures=figures)}
    )
    store = MemoryStore("table")
    put_result(store, "abc", config)
    table = build_table(config, store, {"ours": "abc"})
    base, baseline, ours = table.columns
    assert (base.title, base.source, base.values) == (
        "the source",
        "a paper",
        {"endings": 80.0, "group": 50.0},
    )
    assert (baseline.title, baseline.values, baseline.identity, baseline.harness) == (
        "one-shot baseline",
        {},
        None,
        None,
    )
    assert ours.values == {"endings": pytest.approx(70.83333)} and ours.stderr == {
        "endings": pytest.approx(9.4776, abs=1e-4)
    }
    assert (ours.identity, ours.harness, ours.servers) == ("abc", "0.4.13", ("vllm 0.32.0",))
    assert table_notes(table) == [
        "The source: published figures, not measured here: a paper.",
        "One-shot baseline: not measured.",
        "This checkpoint: lm-evaluation-harness 0.4.13 against vllm 0.32.0, checkpoint abc.",
    ]
    assert BenchmarkTable.from_json(table.to_json(), "table.json") == table


def test_results_of_another_checkpoint_or_setting_are_in_no_table() -> None:
    store = MemoryStore("others")
    put_result(store, "abc", CONFIG.model_copy(update={"limit": 10}))
    put_result(store, "abd", CONFIG)
    assert build_table(CONFIG, store, {"ours": "abc"}).columns[2].values == {}


def test_trial_says_that_it_is_one() -> None:
    config = CONFIG.model_copy(update={"limit": 10})
    store = MemoryStore("trial")
    put_result(store, "abc", config)
    assert (
        table_notes(build_table(config, store, {"ours": "abc"}))[-1]
        == "A trial: at most 10 documents a task."
    )


def test_table_of_a_checkpoint_that_is_no_more_is_not_shown() -> None:
    store = MemoryStore("stale")
    assert read_table(store) is None
    store.put("checkpoint/config.json", b"{}")
    store.put("checkpoint/p48ray.json", b"first")
    table = build_table(CONFIG, store, {"ours": identify(SubStore(store, "checkpoint/"))})
    store.put(run_root.BENCHMARK_TABLE, table.to_json())
    assert read_table(store) == table
    store.put("checkpoint/p48ray.json", b"second")
    assert read_table(store) is None
    store.delete("checkpoint/p48ray.json")
    assert read_table(store) is None


# The configuration.


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"base": {"checkpoint": "a", "figures": "b"}},
            "expected checkpoint or figures, found both",
        ),
        ({"baseline": {}}, "baseline: expected checkpoint or figures, found neither"),
        ({"ours": {"figures": "b"}}, "ours.figures: the run's own checkpoint is measured"),
        ({"tasks": [ENDINGS.model_dump(), ENDINGS.model_dump()]}, "expected each task once"),
        ({"tasks": []}, "at least 1 item"),
    ],
)
def test_columns_and_rows_that_make_no_sense_are_refused(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        BenchmarksConfig.model_validate(section)
