"""The tokenizing bench: both ways in turn on a small corpus, and what it says where they differ."""

from array import array
from pathlib import Path
from typing import Any

import pytest

from bench import tokenizing
from bench.tokenizing import NAMED, compare, corpus, from_files, train
from p48ray.checkpoint.index import open_checkpoint
from p48ray.store import LocalStore
from p48ray.texts.sequences import load_tokenizer
from p48ray.texts.tokenizing import BatchEncoder, PythonEncoder, encoder_of


@pytest.fixture
def texts() -> list[str]:
    return corpus(0.3)[1]


@pytest.fixture
def made(tmp_path: Path, texts: list[str], module_cache: Path) -> tuple[Any, Any]:
    """The tokenizer of Kimi's form, and the fast one of the same merges."""
    (tmp_path / "model").mkdir()
    fast = train(tmp_path / "model", texts, 600)
    index = open_checkpoint(LocalStore(tmp_path / "model"))
    return load_tokenizer(index, trust_remote_code=True), fast


def test_both_tokenizers_are_timed_on_the_ways_that_runs_take(
    made: tuple[Any, Any], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = made
    encoder = encoder_of(slow)
    assert isinstance(encoder, PythonEncoder) and encoder.direct is not None
    assert isinstance(encoder_of(fast), BatchEncoder)
    assert set(slow.convert_tokens_to_ids(list(NAMED))) == set(range(600, 610))
    assert compare("slow", slow, texts, 1) and compare("fast", fast, texts, 1)
    from_files(slow, texts, len(slow))
    said = capsys.readouterr().out
    assert said.count("all the same") == 2 and "four files to sequences" in said


def test_ids_that_differ_are_said(
    made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizing, "in_batches", lambda *_: array("i", [1]))
    assert not compare("slow", made[0], ["two words"], 1)
    assert "NOT THE SAME" in capsys.readouterr().out
