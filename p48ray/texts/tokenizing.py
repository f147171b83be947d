"""From texts to token ids: what transformers' own call of a tokenizer gives, text by text, without
the time that it takes.

A fast tokenizer takes many texts at once and works on them in threads of its own. For one that is
Python, transformers walks over a text character by character to find added tokens, and turns ids
into texts and back. `OwnSteps` does the same steps without that, whatever the class does in
between. Where the class asks a tiktoken.Encoding and does nothing else to ordinary text, that one
is asked at once, in several threads: none of the checkpoint's own code runs in two at a time.

None of it is trusted. Probes decide which way is taken, and of every batch the beginning of one
text goes through transformers' own call too. Where ids differ, everything is tokenized again by
that call alone.
"""

import logging
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from p48ray.errors import P48Error
from p48ray.texts.chat import TOKENIZER_CODE

DIRECT_CHARACTERS = 200_000
DIRECT_RUN = 20_000
"""Longer texts, and texts with more characters in a row that are all white space or none, are left
to the tokenizer's class: Kimi's cuts them (at 400,000 and 25,000), because tiktoken takes too long.
The probes have texts of just these lengths."""
CHECKED_CHARACTERS = 2_048
"""Of a batch, that transformers' own call tokenizes too."""
MEMO_TOKENS = 2**20
MOST_THREADS = 8
MOST_TOKENS = 2_000
"""Added tokens that are compared with each other; more are left to transformers."""
CALL_STEPS = (
    "__call__",
    "_encode_plus",
    "_get_padding_truncation_strategies",
    "tokenize",
    "prepare_for_tokenization",
    "convert_tokens_to_ids",
    "_convert_token_to_id_with_added_voc",
    "prepare_for_model",
    "pad",
    "_pad",
)
"""Methods of transformers that lead from a text to ids. A class that has its own is called."""

T = TypeVar("T")
log = logging.getLogger("p48ray.progress")


class TokensDifferError(P48Error):
    """Ids are not those of transformers' own call."""


def own_call(tokenizer: Any, text: str) -> list[int]:
    """What transformers' own call gives, no special tokens added: the definition."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class Encoder:
    """Texts to ids by the tokenizer's own call, one after the other: right for any, and slow."""

    num_threads = 1
    """That may encode batches at the same time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of each text, of a batch that is not empty."""
        with TOKENIZER_CODE:
            return [own_call(self.tokenizer, text) for text in texts]


class CheckedEncoder(Encoder):
    """Another way to the same ids, held against the own call on a part of every batch."""

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """As Encoder's. Raises: TokensDifferError where the ids are others."""
        found = self.encode_fast(texts)
        beginning = texts[0][:CHECKED_CHARACTERS]
        fast = found[0] if beginning == texts[0] else self.encode_fast([beginning])[0]
        self.check(beginning, fast)
        return found

    def encode_fast(self, texts: Sequence[str]) -> list[Sequence[int]]:
        raise NotImplementedError

    def check(self, text: str, ids: Sequence[int]) -> None:
        """Raises: TokensDifferError where the own call gives other ids."""
        with TOKENIZER_CODE:
            expected = own_call(self.tokenizer, text)
        if list(ids) != list(expected):
            raise TokensDifferError(f"the ids of {text[:60]!r} differ from transformers' own call")


class BatchEncoder(CheckedEncoder):
    """A fast tokenizer: a batch of texts in one call, which has threads of its own."""

    def encode_fast(self, texts: Sequence[str]) -> list[Sequence[int]]:
        found = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[Sequence[int]] = found["input_ids"]
        return ids


class OwnSteps:
    """What transformers does with a text for a tokenizer that is Python: it cuts out the added
    tokens, asks the class for the tokens between them, and looks up their ids."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: one of which `has_plain_steps` is true."""
        self.tokenizer = tokenizer
        added = tokenizer._added_tokens_encoder
        self.whole = {*added, *tokenizer.all_special_tokens}
        self.cuts = frozenset(tokenizer.tokens_trie._tokens)
        self.cut = one_of(self.cuts)
        marked = [tokenizer._added_tokens_decoder.get(i) for i in added.values()]
        # else what stands beside a token changes with it, or which of two is cut out depends on how
        self.is_simple = are_apart(self.cuts) and not any(
            getattr(token, mark, False)
            for token in marked
            for mark in ("lstrip", "rstrip", "single_word")
        )
        self.ids = Memo(tokenizer.convert_tokens_to_ids)

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text; the caller holds TOKENIZER_CODE."""
        if not self.is_simple and self.cut.search(text):
            tokens = self.tokenizer.tokenize(text)
        else:
            tokens = []
            for piece in self.pieces(text):
                if piece in self.whole:
                    tokens.append(piece)
                else:
                    tokens.extend(self.tokenizer._tokenize(piece))
        ids = self.ids
        return array("i", [ids[token] for token in tokens])

    def pieces(self, text: str) -> Iterator[str]:
        """Added tokens, and what stands between them."""
        start = 0
        for match in self.cut.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield match.group()
            start = match.end()
        if start < len(text):
            yield text[start:]


class Memo(dict[str, int]):
    """Ids of tokens that were asked for before."""

    def __init__(self, convert: Callable[[str], int]) -> None:
        super().__init__()
        self.convert = convert

    def __missing__(self, token: str) -> int:
        if len(self) >= MEMO_TOKENS:
            self.clear()
        self[token] = self.convert(token)
        return self[token]


class Direct:
    """The tiktoken.Encoding that a tokenizer's class asks, asked at once."""

    def __init__(self, encoding: Any, steps: OwnSteps) -> None:
        """Args: encoding: of the class. steps: what decides where this way gives other ids."""
        own = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        self.encoding = encoding
        self.special = one_of({*own, *steps.cuts})
        added = steps.tokenizer._added_tokens_encoder
        self.same = {t for t in steps.cuts if t in own and added.get(t) == own[t]}
        self.is_possible = steps.is_simple and are_apart({*own, *steps.cuts})

    def encode(self, text: str) -> Sequence[int] | None:
        """The ids of a text; None where the class has to be asked."""
        if len(text) > DIRECT_CHARACTERS or has_long_run(text):
            return None
        found = set(self.special.findall(text))
        if not found <= self.same:
            return None
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=found, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which the class may replace
            return None
        values: Sequence[int] = ids.view(np.int32)
        return values


class PythonEncoder(CheckedEncoder):
    """A tokenizer that is Python: its own steps, and tiktoken at once where there is one that gives
    the same ids."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises: TokensDifferError when a probe has other ids than by the own call."""
        super().__init__(tokenizer)
        self.steps = OwnSteps(tokenizer)
        for text in probes(self.steps.cuts):
            with TOKENIZER_CODE:
                ids = self.steps.encode(text)
            self.check(text, ids)
        self.direct = self._held(encoding_of(tokenizer))
        self.num_threads = min(MOST_THREADS, os.cpu_count() or 1) if self.direct else 1

    def _held(self, encoding: Any) -> Direct | None:
        """The direct way, if it stands the probes."""
        if encoding is None or not (direct := Direct(encoding, self.steps)).is_possible:
            return None
        for text in (
            *probes({*self.steps.cuts, *encoding.special_tokens_set}),
            *long_probes(encoding),
        ):
            with TOKENIZER_CODE:
                expected = self.steps.encode(text)
            found = direct.encode(text)
            if found is not None and list(found) != list(expected):
                log.info("texts     tiktoken alone gives other ids than the tokenizer's class")
                return None
        return direct

    def encode_fast(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> Sequence[int]:
        found = self.direct.encode(text) if self.direct is not None else None
        if found is not None:
            return found
        with TOKENIZER_CODE:
            return self.steps.encode(text)


def encoder_of(tokenizer: Any) -> Encoder:
    """The fastest way of a tokenizer to the ids of its own call."""
    from transformers import PreTrainedTokenizerBase  # half a second: only where text is read

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return Encoder(tokenizer)
    try:
        if has_plain_steps(tokenizer):
            return BatchEncoder(tokenizer) if tokenizer.is_fast else PythonEncoder(tokenizer)
    except Exception as error:  # noqa: BLE001  probes are odd texts, and its code may raise anything
        log.info("texts     %s: one text at a time: %s", type(tokenizer).__name__, error)
    return Encoder(tokenizer)


def with_encoder(tokenizer: Any, work: Callable[[Encoder], T]) -> T:
    """What `work` makes with the fastest encoder, or again with the own call where ids differ."""
    try:
        return work(encoder_of(tokenizer))
    except TokensDifferError as error:
        log.info("texts     again, one text at a time: %s", error)
        return work(Encoder(tokenizer))


def has_plain_steps(tokenizer: Any) -> bool:
    """Whether all that leads from a text to ids, but for the class's own part, is transformers'
    code."""
    from transformers import PreTrainedTokenizerFast, PythonBackend

    base = PreTrainedTokenizerFast if tokenizer.is_fast else PythonBackend
    return (
        isinstance(tokenizer, base)
        and not tokenizer.split_special_tokens
        and not hasattr(tokenizer, "_switch_to_input_mode")
        and all(getattr(type(tokenizer), s, None) is getattr(base, s, None) for s in CALL_STEPS)
        and not any(step in vars(tokenizer) for step in CALL_STEPS)
    )


def encoding_of(tokenizer: Any) -> Any:
    """The tiktoken.Encoding that a tokenizer holds; None where it holds none, or several."""
    tiktoken = sys.modules.get("tiktoken")
    if tiktoken is None:
        return None
    held = [value for value in vars(tokenizer).values() if isinstance(value, tiktoken.Encoding)]
    return held[0] if len(held) == 1 else None


def has_long_run(text: str) -> bool:
    """Whether more than DIRECT_RUN characters in a row are all white space, or none of them is."""
    if len(text) <= DIRECT_RUN:
        return False
    lengths = [len(word) for word in text.split()]
    if max(lengths, default=0) > DIRECT_RUN:
        return True
    num_spaces = len(text) - sum(lengths)
    return num_spaces > DIRECT_RUN and max(map(len, re.findall(r"\s+", text))) > DIRECT_RUN


def one_of(tokens: set[str] | frozenset[str]) -> re.Pattern[str]:
    """Finds any of these; without any nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens))) if tokens else r"(?!)")


def are_apart(tokens: set[str] | frozenset[str]) -> bool:
    """Whether no token stands within another: then whoever looks for them from left to right finds
    the same ones."""
    return len(tokens) <= MOST_TOKENS and not any(a != b and a in b for a in tokens for b in tokens)


ODD = (
    "",
    " ",
    "\n",
    "  two  spaces\t\ttabs \r\n and\r\rends \n\n\n",
    "It's THEIR'S, we'LL don't; naïve café e\u0301 Ångström A\u030a ﬁ ﬃ ½ ² ℌ",
    "1234567890 3.14159 1e-5 0x1F ٣٤٥ ①②",
    "你好，世界。今天天气很好abc你好 中文 繁體字 かな カナ ｶﾅ 한국어 ＡＢＣ １２３",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈 \u200b\u200d\ufeff\u00a0\u2028\u3000\u0085 end",
    "عربى עברית हिन्दी ไทย ελληνικά Русский İstanbul ẞß ǅ",
    "\x00\x01\x1b[0m\x7f \ufffd \ufffe \U0010ffff",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # <tag attr=\"1\"/> <| |> [ ]\n\n\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!----====",
)
"""Texts that a tokenizer may do something of its own with: normal forms, white space, case."""


def probes(tokens: set[str] | frozenset[str]) -> Iterator[str]:
    """Odd texts, and all these tokens alone, glued to text, beside white space and cut in two."""
    yield from ODD
    for token in sorted(tokens):
        yield f"{token}a{token}{token} b {token}\n{token[:-1]} {token[1:]}{token.upper()}"


def long_probes(encoding: Any) -> Iterator[str]:
    """Texts as long as the direct way takes them: words, and characters without white space. Each
    has three beginnings, so that a class that cut them anywhere would cut a word in two in one.
    And much white space."""
    words = [t for t in encoding.token_byte_values() if t.isalpha() and t.islower()]
    short = [w.decode("ascii") for w in words if w.isascii() and len(w) <= 24]
    word = max(short, key=len, default="word")
    for beginning in ("", "x", "xy"):
        yield (beginning + f" {word}" * DIRECT_CHARACTERS)[:DIRECT_CHARACTERS]
        yield (beginning + f",{word}" * DIRECT_RUN)[:DIRECT_RUN]
    yield f"a{' ' * DIRECT_RUN}b{chr(10) * DIRECT_RUN}"
