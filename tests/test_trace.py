"""Spans: nothing without a folder; with one, lines that can be read and say which stage they belong
to."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from p48ray import trace


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(trace.TRACE_VARIABLE, str(tmp_path))
    return tmp_path


def lines(folder: Path) -> list[dict[str, Any]]:
    """All spans of this process, as they ended."""
    (file,) = folder.iterdir()
    assert file.name == f"{os.getpid()}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_folder_nothing_is_written(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(trace.TRACE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(trace.TRACE_VARIABLE, value)
    with trace.task("capture", "part-0"), trace.span("hash", 7, "a key"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_span_says_what_it_was_how_long_and_where(folder: Path) -> None:
    with trace.span("hash", 7, "residuals/layer-002/part-0000.arrow"):
        pass
    (line,) = lines(folder)
    assert set(line) == {"kind", "stage", "start", "seconds", "bytes", "thread", "what"}
    assert (line["kind"], line["bytes"], line["what"]) == (
        "hash",
        7,
        "residuals/layer-002/part-0000.arrow",
    )
    assert (
        line["thread"] == threading.get_ident()
        and line["start"] > 1.6e9
        and 0 <= line["seconds"] < 60
    )


def test_words_of_any_kind_stay_one_line(folder: Path) -> None:
    what = 'a "key"\nof two lines, ünïcode'
    with trace.span("read", what=what):
        pass
    (line,) = lines(folder)
    assert line["what"] == what


def test_the_stage_follows_the_task(folder: Path) -> None:
    for stage, spans in (("capture", ("encode", "write")), ("gradients", ("hash",))):
        with trace.task(stage, f"{stage} 1"):
            for kind in spans:
                with trace.span(kind):  # type: ignore[arg-type]
                    pass
    found = [(line["stage"], line["kind"], line["what"]) for line in lines(folder)]
    assert found == [
        ("capture", "encode", ""),
        ("capture", "write", ""),
        ("capture", "task", "capture 1"),
        ("gradients", "hash", ""),
        ("gradients", "task", "gradients 1"),
    ]


def test_threads_of_a_task_belong_to_its_stage_and_do_not_mix_their_lines(folder: Path) -> None:
    def work(name: int) -> None:
        for _ in range(50):
            with trace.span("write", name, "x" * 5000):
                pass

    with trace.task("capture", "all"):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = lines(folder)
    assert len(found) == 4 * 50 + 1 and {line["stage"] for line in found} == {"capture"}
    assert sorted(line["bytes"] for line in found if line["kind"] == "write") == sorted(
        list(range(4)) * 50
    )


def test_a_span_that_fails_is_written_and_its_error_goes_on(folder: Path) -> None:
    with (
        pytest.raises(ValueError, match="no room"),
        trace.task("compress", "L001-E000-003"),
        trace.span("write", 3),
    ):
        raise ValueError("no room")
    assert [(line["kind"], line["stage"]) for line in lines(folder)] == [
        ("write", "compress"),
        ("task", "compress"),
    ]
