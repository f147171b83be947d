"""Texts packed as a source of their own, and by the plain loop that packing is held against."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from p48ray.texts.packing import packer_of
from p48ray.texts.tally import Tally
from p48ray.texts.tokenizing import Encoder, encoder_of


def packed(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    most: int | None = None,
    tally: Tally | None = None,
    encoder: Encoder | None = None,
) -> Tensor:
    """(rows, length) int32."""
    with packer_of(encoder or encoder_of(tokenizer)) as packer:
        return packer.pack(iter(texts), length, most, tally)


def packed_one_by_one(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    most: int | None = None,
    tally: Tally | None = None,
) -> list[list[int]]:
    """Rows by a loop that asks transformers' own call for each text, and for no text too many."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos_id = None if bos else getattr(tokenizer, "eos_token_id", None)
    between: list[int] = []
    ids: list[int] = []
    for text in texts:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += between + bos + own
        ends_itself = eos_id is None or text.rstrip().endswith(tokenizer.eos_token)
        between = [] if ends_itself else [eos_id]
        if most is not None and len(ids) >= most * length:
            break
    if tally is not None:
        tally.tokens = len(ids)
    rows = len(ids) // length if most is None else min(most, len(ids) // length)
    return [ids[i * length : (i + 1) * length] for i in range(rows)]
