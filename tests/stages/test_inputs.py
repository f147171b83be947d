"""The texts of a run: what a dry run says of them, what their manifest and report keep, and whose
packed texts are taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from p48ray.config.load import load_config
from p48ray.errors import CalibrationError, ConfigError, PlanMismatchError
from p48ray.report.report import texts_words
from p48ray.run import plan as plans
from p48ray.run import run_root
from p48ray.run.manifest import TokensManifest
from p48ray.stages import inputs
from p48ray.stages.inputs import are_packed, sampled_texts, write_inputs
from p48ray.stages.prepare import Prepared, prepare
from p48ray.store import LocalStore
from tests.conftest import REPO
from tests.servers.hub import Hub, hub
from tests.stages.small_run import SETTINGS, SmallRun

__all__ = ["hub"]

ROWS = [{"text": f"A sentence of prose, the number {i} of many."} for i in range(40)]
MESSY = [{"text": None}, {"text": ""}, *ROWS]


def prepared(tmp_path: Path, *settings: str, is_dry: bool = False) -> Prepared:
    config = load_config(
        REPO / "configs" / "tiny.yaml", (*SETTINGS, *settings), str(tmp_path / "run")
    )
    return prepare(config, is_dry=is_dry)


def documents(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"calibration.documents={json.dumps([{'path': str(path)} | settings])}"


def test_dry_run_counts_documents_tokens_and_what_is_skipped(tmp_path: Path) -> None:
    found = prepared(tmp_path, documents(tmp_path, *MESSY), is_dry=True)
    calibration, evaluation = sampled_texts(found)
    assert calibration.startswith(f"calibration texts: {tmp_path}/texts.jsonl: 40 documents of 42")
    assert calibration.endswith("tokens; skipped: 1 empty, 1 null where a text should be")
    assert evaluation.startswith("evaluation texts: ") and "skipped" not in evaluation
    assert not (tmp_path / "run").exists()
    written = prepared(tmp_path, documents(tmp_path, *MESSY))
    write_inputs(written)
    record = TokensManifest.load(written.store, run_root.manifest_of(run_root.TOKENS))
    (source,) = record.sources
    assert inputs.spell_texts(source) in calibration and source.tokens >= 6 * 64
    assert source.skipped == {"null where a text should be": 1, "empty": 1}


def test_dry_run_says_how_much_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SAMPLE_CHARACTERS", 200)
    found = prepared(tmp_path, documents(tmp_path, *MESSY), is_dry=True)
    line = sampled_texts(found)[0]
    assert "5 documents of 7 rows" in line
    assert line.endswith(" (a sample: the first 200 characters)")


def test_dry_run_asks_nobody_else(tmp_path: Path) -> None:
    found = prepared(tmp_path, "calibration.documents=hf://datasets/nobody/nothing", is_dry=True)
    assert sampled_texts(found)[0] == (
        "calibration texts: hf://datasets/nobody/nothing: not read, it is not on this machine"
        " (--texts asks for a sample)"
    )


def test_dry_run_that_asks_reads_a_sample_of_a_data_set(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SAMPLE_CHARACTERS", 200)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in MESSY)
    hub.commit("datasets/owner/texts", {"data/a.jsonl": lines})
    setting = "calibration.documents=hf://datasets/owner/texts/data"
    found = sampled_texts(prepared(tmp_path, setting, is_dry=True), is_asking=True)[0]
    assert found.startswith("calibration texts: hf://datasets/owner/texts/data: 5 documents of 7")
    assert found.endswith(" (a sample: the first 200 characters)")
    assert not (tmp_path / "run").exists()


def test_dry_run_that_asks_in_vain_says_for_what(hub: Hub, tmp_path: Path) -> None:
    found = prepared(tmp_path, "calibration.documents=hf://datasets/nobody/nothing", is_dry=True)
    with pytest.raises(ConfigError, match=r"calibration\.documents: .*datasets/nobody/nothing"):
        sampled_texts(found, is_asking=True)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (ROWS[:2], {}, r"expected text for 6 sequences of 64 tokens, found 0 in 2 documents"),
        ([], {}, r"found 0 in 0 documents \(0 rows, skipped: none\)"),
        (MESSY, {"max_skipped_share": 0.01}, r"line 1: 'text': expected a text or a chat, found"),
        ([{"messages": [{"role": "user", "content": "u"}]}], {}, "has no chat template"),
    ],
)
def test_dry_run_refuses_what_the_run_would(
    rows: list[dict[str, Any]], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    setting = documents(tmp_path, *rows, **settings)
    with pytest.raises(CalibrationError, match=rf"calibration\.documents: .*{words}"):
        sampled_texts(prepared(tmp_path, setting, is_dry=True))
    with pytest.raises(CalibrationError, match=rf"calibration\.documents: .*{words}"):
        write_inputs(prepared(tmp_path, setting))
    assert not (tmp_path / "run").exists()


def test_report_says_what_was_read_of_every_source(finished: SmallRun) -> None:
    texts = finished.report.texts
    assert set(texts) == {"calibration", "evaluation"}
    for section, words in zip(texts, texts_words(finished.report), strict=True):
        (source,) = texts[section]
        assert source.documents > 0 and not source.skipped
        assert f"{section} texts: {source.path}: {source.documents:,} documents" in words
        page = (finished.root / run_root.REPORT_PAGE).read_text()
        assert f"{source.documents:,} documents of {source.rows:,} rows" in page
    kept = json.loads((finished.root / run_root.REPORT).read_text())["texts"]
    assert kept["calibration"][0]["rows"] == texts["calibration"][0].rows


def test_texts_that_an_older_version_packed_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files were other texts to it."""
    settings = documents(tmp_path, *ROWS)
    monkeypatch.setattr(plans, "NUMERICS_VERSION", plans.NUMERICS_VERSION - 1)
    old = prepared(tmp_path, settings)
    write_inputs(old)
    monkeypatch.undo()
    new = prepared(tmp_path, settings)
    store = LocalStore(tmp_path / "run")
    assert are_packed(store, run_root.TOKENS, old.plan.units_digest)
    assert not are_packed(store, run_root.TOKENS, new.plan.units_digest)
    with pytest.raises(PlanMismatchError, match="numerics version"):
        write_inputs(new)


@pytest.mark.parametrize(
    ("settings", "is_same"),
    [
        ({"columns": {"text": "body"}}, False),
        ({"reasoning": "think_tags"}, False),
        ({"template_arguments": {"preserve_thinking": True}}, False),
        ({"max_skipped_share": 0.5}, True),
    ],
)
def test_how_texts_are_read_belongs_to_the_units(
    settings: dict[str, Any], is_same: bool, tmp_path: Path
) -> None:
    rows = [row | {"body": row["text"]} for row in ROWS]
    digests = [
        prepared(tmp_path, documents(tmp_path, *rows, **more)).plan.units_digest
        for more in ({}, settings)
    ]
    assert (digests[0] == digests[1]) == is_same
