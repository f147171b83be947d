"""Packing against a plain loop: rows, counts and errors do not depend on batches, threads, or on
what is read ahead."""

import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError
from p48ray.texts import packing, sequences
from p48ray.texts.documents import read_documents
from p48ray.texts.packing import PackingProgress, StoppedError, packer_of
from p48ray.texts.sequences import SOURCES_AT_ONCE, load_sequences
from p48ray.texts.tally import Tally
from p48ray.texts.tokenizing import Encoder, TokensDifferError
from tests.texts.packed import packed, packed_one_by_one

KEY = "calibration.documents"


class Letters:
    """A tokenizer of one id a letter, a = 0."""

    bos_token_id: int | None = 1000

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        if "!" in text:
            raise ValueError(f"no id for {text}")
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class Separated(Letters):
    bos_token_id = None
    eos_token_id, eos_token = 7, "h"


class Threads(Encoder):
    """In so many threads, which finish in an order of their own."""

    def __init__(self, tokenizer: Any, num_threads: int) -> None:
        super().__init__(tokenizer)
        self.num_threads = num_threads

    def encode(self, texts: Any) -> Any:
        time.sleep(0.001 * (len(texts[0]) % 3))
        return [self.tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(params=[(1, 1), (1, 7), (4, 1), (4, 40), (4, 10**6)])
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Threads, with batches of a few characters, or of all."""
    num_threads, characters = request.param
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", characters)
    return int(num_threads)


def source(path: Path, *rows: Any, **settings: Any) -> DocumentSource:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return DocumentSource(path=str(path), max_skipped_share=1.0, **settings)


def counts(tally: Tally) -> tuple[Any, ...]:
    return (
        *(tally.rows, tally.documents, tally.characters, tally.tokens),
        *(dict(tally.skipped), dict(tally.cut), tally.first),
    )


@pytest.mark.parametrize("tokenizer", [Letters(), Separated()], ids=["bos", "eos"])
@pytest.mark.parametrize("most", [None, 0, 1, 2, 7, 20, 21, 22, 1000])
def test_rows_and_counts_are_those_of_a_loop(
    tmp_path: Path, small_batches: int, tokenizer: Any, most: int | None
) -> None:
    """Of four rows two are of no use: how many of them count depends on where one stops."""
    texts = [{"text": [None, "", "abcdefgh"[: 1 + i % 8]][min(2, i % 4)]} for i in range(120)]
    document = source(tmp_path / "a.jsonl", *texts)
    found, expected = Tally(), Tally()
    rows = packed(
        read_documents(document, KEY, tally=found),
        tokenizer, 10, most, found, Threads(tokenizer, small_batches),
    )  # fmt: skip
    texts_again = read_documents(document, KEY, tally=expected)
    assert rows.tolist() == packed_one_by_one(texts_again, tokenizer, 10, most, expected)
    assert counts(found) == counts(expected) and found.skipped


def test_bad_row_is_an_error_only_if_it_is_reached(tmp_path: Path, small_batches: int) -> None:
    document = source(tmp_path / "a.jsonl", *[{"text": "abcd"}] * 10, "no json\n", {"text": "a"})

    def pack(most: int) -> torch.Tensor:
        tally = Tally()
        texts = read_documents(document, KEY, tally=tally)
        return packed(texts, Letters(), 5, most, tally, Threads(Letters(), small_batches))

    assert len(pack(10)) == 10
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 11: expected a JSON object"):
        pack(11)


def test_text_that_the_tokenizer_refuses_is_an_error_only_if_it_is_reached(
    small_batches: int,
) -> None:
    texts = ["abcd"] * 10 + ["wrong!", "also!"]
    encoder = Threads(Letters(), small_batches)
    assert len(packed(texts, Letters(), 5, 10, encoder=encoder)) == 10
    with pytest.raises(ValueError, match="no id for wrong!"):
        packed(texts, Letters(), 5, 11, encoder=encoder)


class Text(str):
    """One that can be watched."""


@pytest.mark.parametrize("num_threads", [1, 4])
def test_no_more_texts_are_in_memory_than_a_batch_a_thread_and_two(
    monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def texts() -> Iterator[str]:
        nonlocal most
        for i in range(2000):
            text = Text(f"{'abcdefghij' * 2}{chr(97 + i % 26)}")
            alive.add(text)
            most = max(most, sum(1 for _ in alive))
            yield text

    assert len(packed(texts(), Letters(), 21, encoder=Threads(Letters(), num_threads))) > 1900
    assert 5 <= most <= 5 * (num_threads + 2) + 1


def test_few_wanted_tokens_read_few_texts_ahead() -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "abcdefghi"

    packed(texts(), Letters(), 100, most=1, encoder=Threads(Letters(), 4))
    assert 10 <= taken <= 45


def test_ids_that_differ_are_not_taken_for_a_texts_fault() -> None:
    class Differs(Encoder):
        def encode(self, texts: Any) -> Any:
            raise TokensDifferError("they do")

    with pytest.raises(TokensDifferError, match="they do"):
        packed(["a"], Letters(), 1, encoder=Differs(Letters()))


def test_packer_that_is_stopped_ends() -> None:
    with packer_of(Encoder(Letters())) as packer:
        packer.stopped.set()
        with pytest.raises(StoppedError):
            packer.pack(iter(["a"]), 1)


# Several sources.


def load(*documents: DocumentSource, num_sequences: int = 8) -> tuple[torch.Tensor, list[Tally]]:
    tallies: list[Tally] = []
    found = load_sequences(documents, Letters(), num_sequences, 4, 3, 2000, "calibration", tallies)
    return found, tallies


def sources(folder: Path, count: int) -> list[DocumentSource]:
    return [
        source(
            folder / f"{i}.jsonl",
            *[{"text": chr(97 + i) * (3 + n % 5)} for n in range(40)],
            {"text": None},
            weight=1.0 + i,
        )
        for i in range(count)
    ]


def test_sources_read_at_once_give_what_they_give_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = sources(tmp_path, 6)
    found, tallies = load(*documents, num_sequences=60)
    monkeypatch.setattr(sequences, "SOURCES_AT_ONCE", 1)
    one_by_one, one_by_one_tallies = load(*documents, num_sequences=60)
    assert torch.equal(found, one_by_one)
    assert list(map(counts, tallies)) == list(map(counts, one_by_one_tallies))
    assert [t.skipped.total() for t in tallies] == [1] * 6


def test_several_sources_are_read_at_once_and_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones meet, or the barrier breaks."""
    meeting = threading.Barrier(SOURCES_AT_ONCE, timeout=60)
    inside, most, lock = Counter[str](), [0], threading.Lock()

    def reading(document: DocumentSource, *arguments: Any) -> Iterator[str]:
        with lock:
            inside["now"] += 1
            most[0] = max(most[0], inside["now"])
        if int(Path(document.path).stem) < SOURCES_AT_ONCE:
            meeting.wait()
        yield from read_documents(document, *arguments)
        with lock:
            inside["now"] -= 1

    monkeypatch.setattr(sequences, "read_documents", reading)
    load(*sources(tmp_path, 2 * SOURCES_AT_ONCE), num_sequences=40)
    assert most[0] == SOURCES_AT_ONCE


def test_error_is_that_of_the_first_source_in_the_mix_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the third one's is there before the second begins."""
    good = sources(tmp_path, 1)[0]
    slow = source(tmp_path / "slow.jsonl", "bad\n")
    fast = source(tmp_path / "fast.jsonl", "worse\n")
    has_failed = threading.Event()

    def reading(document: DocumentSource, *arguments: Any) -> Iterator[str]:
        try:
            if document is slow:
                assert has_failed.wait(60)
            yield from read_documents(document, *arguments)
        except CalibrationError:
            has_failed.set()
            raise

    monkeypatch.setattr(sequences, "read_documents", reading)
    with pytest.raises(CalibrationError, match=r"slow\.jsonl, line 1: .*found b'bad'"):
        load(good, slow, fast)


def test_after_an_error_no_other_source_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 4)
    bad = source(tmp_path / "bad.jsonl", "bad\n")
    endless = source(tmp_path / "endless.jsonl", {"text": "abcd"})

    def reading(document: DocumentSource, *arguments: Any) -> Iterator[str]:
        if document is endless:
            while True:
                yield "abcd"
        yield from read_documents(document, *arguments)

    monkeypatch.setattr(sequences, "read_documents", reading)
    with pytest.raises(CalibrationError, match="bad"):
        load(bad, endless)


# Progress.


def test_progress_is_told_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([0.0, 9.0, 11.0, 15.0, 22.0])
    progress = PackingProgress("calibration.documents: a.jsonl", 8_388_608, seconds.__next__)
    with caplog.at_level("INFO", "p48ray.progress"):
        for documents in (900, 1_100, 1_500, 2_200):
            progress.tell(documents, 1_000 * documents)
    assert [record.message for record in caplog.records] == [
        "texts     calibration.documents: a.jsonl: 1,100 documents, 1,100,000 tokens (8,388,608"
        " wanted)  100,000 tokens/s",
        "texts     calibration.documents: a.jsonl: 2,200 documents, 2,200,000 tokens (8,388,608"
        " wanted)  100,000 tokens/s",
    ]


def test_every_source_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "TELLING_INTERVAL_S", 0.0)
    with caplog.at_level("INFO", "p48ray.progress"):
        load(*sources(tmp_path, 2), num_sequences=6)
    for name, wanted in (("0", 8), ("1", 16)):
        assert f"{name}.jsonl: 40 documents, 240 tokens ({wanted} wanted)" in caplog.text
