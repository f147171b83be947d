"""Texts into rows of token ids of one length.

Documents are tokenized in batches, some ahead of the one that is packed, and packed in the order in
which they are read. What was read ahead and is not needed is forgotten, with its counts and its
errors: rows and tallies are those of a loop over the texts one by one.
"""

import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from p48ray.texts.tally import Tally
from p48ray.texts.tokenizing import Encoder, TokensDifferError

BATCH_CHARACTERS = 2**18
BATCH_TEXTS = 1_024
MOST_CHARACTERS_A_TOKEN = 4
"""Fewer than most texts have: so many are read ahead for each token that is still wanted."""
TELLING_INTERVAL_S = 10.0
log = logging.getLogger("p48ray.progress")


@dataclass(slots=True)
class TextBatch:
    """Texts in the order in which they were read; after each, what was counted of its source until
    then; and the error that came instead of a further text."""

    texts: list[str] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    error: Exception | None = None
    num_characters: int = 0
    ids: "Future[list[Sequence[int]]] | None" = None


class PackingProgress:
    """Says from time to time how far the packing of a source is."""

    def __init__(
        self, source: str, wanted: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: source: its name. wanted: tokens that are enough. clock: seconds."""
        self.source, self.wanted, self.clock = source, wanted, clock
        self.start = self.last = clock()

    def tell(self, documents: int, tokens: int) -> None:
        """A line in the log, if the last is old enough."""
        now = self.clock()
        if now - self.last < TELLING_INTERVAL_S:
            return
        self.last = now
        rate = tokens / (now - self.start)
        log.info(
            "texts     %s: %s documents, %s tokens (%s wanted)  %s tokens/s",
            self.source,
            f"{documents:,}",
            f"{tokens:,}",
            f"{self.wanted:,}",
            f"{rate:,.0f}",
        )


class StoppedError(Exception):
    """Another source has failed; nobody wants this one any more."""


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs sources of one tokenizer, with the threads that all of them share."""

    encoder: Encoder
    pool: Executor
    stopped: threading.Event

    def pack(
        self,
        texts: Iterator[str],
        length: int,
        most: int | None = None,
        tally: Tally | None = None,
        progress: PackingProgress | None = None,
    ) -> Tensor:
        """Token ids of all texts, bos before each, cut into rows of `length`; the rest is dropped.
        Where the tokenizer has no bos, eos stands between two texts, unless the first ends with it.
        Returns (rows, length) int32.

        Args:
            texts: taken until there are enough.
            length: tokens a row.
            most: rows after which no further text is wanted; None takes all texts.
            tally: counts what `texts` reads; reset to where the last text that is used was read,
                with its tokens.
            progress: told of every batch.
        Raises: what `texts` or the tokenizer raises, once it is that text's turn; StoppedError when
            this packer was stopped; TokensDifferError.
        """
        rows = PackedIds(self.encoder, length, most)
        waiting: deque[TextBatch] = deque()
        is_over = False
        while not rows.are_enough and not (is_over and not waiting):
            while not is_over and len(waiting) <= self.encoder.num_threads:
                ahead = sum(batch.num_characters for batch in waiting)
                wanted = rows.num_wanted_characters - ahead
                if waiting and wanted <= 0:
                    break
                batch = self.read(texts, wanted, tally, most is not None)
                is_over = batch.error is not None
                waiting.append(batch)
            self.check()
            rows.take(waiting.popleft())
            if progress is not None:
                progress.tell(rows.num_texts, len(rows.ids))
        if tally is not None:
            if rows.tally is not None:
                tally.become(rows.tally)
            tally.tokens = len(rows.ids)
        return rows.to_tensor()

    def check(self) -> None:
        """Raises: StoppedError when it was stopped."""
        if self.stopped.is_set():
            raise StoppedError

    def read(
        self, texts: Iterator[str], wanted: float, tally: Tally | None, keep_tallies: bool
    ) -> TextBatch:
        """The next batch, on its way to its ids.

        Args:
            texts: the source.
            wanted: characters after which the batch need not be larger.
            tally: that counts the source.
            keep_tallies: whether packing may end within the batch.
        """
        batch = TextBatch()
        while (
            batch.num_characters < min(BATCH_CHARACTERS, max(1, wanted))
            and len(batch.texts) < BATCH_TEXTS
        ):
            try:
                text = next(texts)
            except Exception as error:  # noqa: BLE001  raised when it is its turn
                batch.error = error
                break
            batch.texts.append(text)
            batch.num_characters += len(text)
            if tally is not None and keep_tallies:
                batch.tallies.append(tally.copy())
        if batch.texts:
            batch.ids = self.pool.submit(self.encoder.encode, batch.texts)
        return batch


class PackedIds:
    """Ids of the texts that were packed so far."""

    def __init__(self, encoder: Encoder, length: int, most: int | None) -> None:
        self.encoder, self.length, self.most = encoder, length, most
        tokenizer = encoder.tokenizer
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos_id = None if self.bos else getattr(tokenizer, "eos_token_id", None)
        self.between: list[int] = []
        self.ids = array("i")
        self.num_texts = 0
        self.tally: Tally | None = None

    @property
    def are_enough(self) -> bool:
        return (
            self.most is not None
            and self.num_texts > 0
            and len(self.ids) >= self.most * self.length
        )

    @property
    def num_wanted_characters(self) -> float:
        """That may be needed yet."""
        if self.most is None:
            return float("inf")
        return MOST_CHARACTERS_A_TOKEN * (self.most * self.length - len(self.ids))

    def take(self, batch: TextBatch) -> None:
        """Pack a batch, as far as it is needed. Raises: the error that it ends with, if that is
        reached."""
        for at, (text, own) in enumerate(zip(batch.texts, self.encoded(batch), strict=True)):
            self.ids.extend(self.between + self.bos)
            if isinstance(own, np.ndarray):
                self.ids.frombytes(own.tobytes())
            else:
                self.ids.extend(own)
            # a template may end with eos and white space after it
            ends_itself = self.eos_id is None or text.rstrip().endswith(
                self.encoder.tokenizer.eos_token
            )
            self.between = [] if self.eos_id is None or ends_itself else [self.eos_id]
            self.num_texts += 1
            if self.are_enough:
                self.tally = batch.tallies[at] if batch.tallies else None
                return
        if batch.error is not None and not isinstance(batch.error, StopIteration):
            raise batch.error

    def encoded(self, batch: TextBatch) -> Iterator[Sequence[int]]:
        if batch.ids is None:
            return
        try:
            found = batch.ids.result()
        except TokensDifferError:
            raise
        except Exception:  # noqa: BLE001  raised when it is the turn of the text that it is about
            one_by_one = Encoder(self.encoder.tokenizer)
            yield from (one_by_one.encode([text])[0] for text in batch.texts)
            return
        yield from found

    def to_tensor(self) -> Tensor:
        """(rows, length) int32."""
        rows = len(self.ids) // self.length
        rows = rows if self.most is None else min(self.most, rows)
        ids = np.frombuffer(self.ids, dtype=np.int32, count=rows * self.length)
        return torch.from_numpy(ids.copy()).reshape(rows, self.length)


@contextmanager
def packer_of(encoder: Encoder) -> Iterator[Packer]:
    """A packer for as long as the context lasts; an error ends what it has under way."""
    stopped = threading.Event()
    pool = ThreadPoolExecutor(encoder.num_threads, thread_name_prefix="tokenize")
    try:
        yield Packer(encoder, pool, stopped)
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
