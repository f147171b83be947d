"""The table of benchmarks in the card, in report.html, in report.json and on a terminal."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from p48ray.config.benchmarks import BenchmarkTask
from p48ray.report.benchmark_section import print_benchmarks
from p48ray.report.card import model_card
from p48ray.report.html import report_html
from p48ray.report.report import Report
from p48ray.report.serving_card import serving_flags
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkColumn, BenchmarkTable, identify
from p48ray.run.manifest import UnitManifest
from p48ray.runner.pipeline import write_report
from p48ray.store import MemoryStore
from p48ray.store.view import SubStore
from tests.report.test_html import Page
from tests.stages.small_run import SmallRun, run_locally

TABLE = BenchmarkTable(
    tasks=(
        BenchmarkTask(task="arc_challenge", title="ARC-Challenge", shots=25, metric="acc_norm"),
        BenchmarkTask(
            task="gsm8k", title="GSM8K", shots=5, metric="exact_match", filter="strict-match"
        ),
    ),
    columns=(
        BenchmarkColumn(
            role="base",
            title="<base>",
            source="a paper, table 3",
            values={"arc_challenge": 80.0, "gsm8k": 50.0},
        ),
        BenchmarkColumn(role="baseline", title="one-shot baseline", values={}),
        BenchmarkColumn(
            role="ours",
            title="this checkpoint",
            identity="0123456789abcdef",
            harness="0.4.13",
            servers=("vllm 0.32.0",),
            values={"arc_challenge": 72.0},
            stderr={"arc_challenge": 1.25},
        ),
    ),
)
UNMEASURED = TABLE.model_copy(
    update={"columns": (*TABLE.columns[:2], TABLE.columns[2].model_copy(update={"values": {}}))}
)


@pytest.fixture
def units(finished: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]


def test_card_has_the_table_with_empty_cells(finished: SmallRun, units: list[UnitManifest]) -> None:
    text = model_card(finished.context, units, finished.report.quality, None, TABLE)
    for line in (
        "| per cent |  | &#60;base&#62; | one-shot baseline | this checkpoint | Δ to base |"
        " recovery |",
        "| ARC-Challenge | 25-shot acc_norm | 80.00 |  | 72.00 | -8.00 | 90.0% |",
        "| GSM8K | 5-shot exact_match (strict-match) | 50.00 |  |  |  |  |",
        "| average | of 1 of 2 tasks | 80.00 |  | 72.00 | -8.00 | 90.0% |",
    ):
        assert line in text.splitlines()
    assert "&#60;base&#62;: published figures, not measured here: a paper, table 3." in text
    assert (
        "This checkpoint: lm-evaluation-harness 0.4.13 against vllm 0.32.0, checkpoint"
        " 0123456789ab." in text
    )
    assert "by p48ray's own evaluation." in text


@pytest.mark.parametrize("table", [None, UNMEASURED])
def test_card_without_a_figure_of_its_checkpoint_says_that_none_was_run(
    finished: SmallRun, units: list[UnitManifest], table: BenchmarkTable | None
) -> None:
    text = model_card(finished.context, units, finished.report.quality, None, table)
    assert "by p48ray's own evaluation; no other benchmark was run." in text
    assert "Benchmarks" not in text and "recovery" not in text


def test_card_of_a_run_without_held_out_text_has_its_benchmarks(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    text = model_card(finished.context, units, None, None, TABLE)
    assert "| ARC-Challenge | 25-shot acc_norm | 80.00 |  | 72.00 | -8.00 | 90.0% |" in text
    assert "Not evaluated on held-out text by the job that made it." in text


def test_page_has_the_table_and_escapes_it(finished: SmallRun, units: list[UnitManifest]) -> None:
    text = report_html(
        finished.context, finished.report.model_copy(update={"benchmarks": TABLE}), units
    )
    words = re.sub(r"\s+", " ", Page(text).words["benchmarks"])
    for line in (
        "ARC-Challenge 25-shot acc_norm 80.00 72.00 ± 1.25 -8.00 90.0%",
        "average of 1 of 2 tasks 80.00 72.00 -8.00 90.0%",
    ):
        assert line in words
    assert "a paper, table 3" in words and "vllm 0.32.0" in words
    assert "&lt;base&gt;" in text and "<base>" not in text
    assert "benchmarks" not in Page(report_html(finished.context, finished.report, units)).words


def test_terminal_shows_the_same_table() -> None:
    out = io.StringIO()
    print_benchmarks(TABLE, Console(file=out, width=160))
    text = re.sub(r"[│┃ ]+", " ", out.getvalue())
    assert "ARC-Challenge 25-shot acc_norm 80.00 72.00 ± 1.25 -8.00 90.0%" in text
    assert "One-shot baseline: not measured." in text


def test_report_is_written_with_its_benchmarks_and_read_again(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    store = MemoryStore("written-report")
    report = finished.report.model_copy(update={"benchmarks": TABLE})
    write_report(replace(finished.context, store=store), report, units)
    assert Report.load(store, run_root.REPORT) == report
    assert (
        "ARC-Challenge" in store.get("checkpoint/README.md").decode()
        and "ARC-Challenge" in store.get(run_root.REPORT_PAGE).decode()
    )


def test_report_of_before_there_were_benchmarks_is_still_read(finished: SmallRun) -> None:
    data = finished.report.to_json().replace(b' "benchmarks": null,\n', b"")
    assert b"benchmarks" not in data
    assert Report.from_json(data, "report.json") == finished.report


def test_run_that_is_called_again_keeps_its_benchmarks(finished: SmallRun) -> None:
    """The compression job writes report and card anew each time; put back afterwards, since others
    look at this run."""
    store = finished.prepared.store
    ours = TABLE.columns[2].model_copy(
        update={"identity": identify(SubStore(store, run_root.CHECKPOINT))}
    )
    table = TABLE.model_copy(update={"columns": (*TABLE.columns[:2], ours)})
    files = (run_root.REPORT, run_root.REPORT_PAGE, "checkpoint/README.md")
    before = {key: store.get(key) for key in files}
    try:
        store.put(run_root.BENCHMARK_TABLE, table.to_json())
        assert run_locally(finished.prepared).benchmarks == table
        assert all("ARC-Challenge" in store.get(key).decode() for key in files)
    finally:
        store.delete(run_root.BENCHMARK_TABLE)
        for key, data in before.items():
            store.put(key, data)


def test_source_is_served_without_a_backend_for_nvfp4() -> None:
    flags = serving_flags("kimi_k25", 8)
    assert flags[0] == "--tensor-parallel-size 8" and flags[-1] == "--moe-backend flashinfer_trtllm"
    assert serving_flags("kimi_k25", 8, is_nvfp4=False) == flags[:-1]
