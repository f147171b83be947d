"""Every way to ids against transformers' own call, on texts that are meant to tell them apart."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p48ray.checkpoint.index import open_checkpoint
from p48ray.store import LocalStore
from p48ray.texts import tokenizing
from p48ray.texts.sequences import load_tokenizer
from p48ray.texts.tokenizing import (
    DIRECT_CHARACTERS,
    DIRECT_RUN,
    ODD,
    BatchEncoder,
    Encoder,
    PythonEncoder,
    TokensDifferError,
    encoder_of,
    own_call,
    with_encoder,
)
from tests.conftest import TINY
from tests.texts.tiktoken_source import NAMED, pieces_files, tokenizer_files

pytestmark = pytest.mark.usefixtures("module_cache")

WORDS = ("encyclopedia", "中文", "你好", " the", "123", "<|", "|>")
LONG = {
    "no white space": "encyclopedia," * 40_000,
    "no white space, Chinese": "你好中文" * 125_000,
    "white space": "a" + " " * 60_000 + "\n" * 60_000 + "b",
    "words": "the encyclopedia of 123 中文 " * 20_000,
    "a special token in a long run": "x" * 24_999 + "<|im_user|>" + "x" * 25_001 + "[EOS]",
    "a run as long as is taken": "ab" * (DIRECT_RUN // 2) + " " + "ab" * (DIRECT_RUN // 2),
    "a run one longer": "ab" * (DIRECT_RUN // 2) + "c encyclopedia",
    "as long as is taken": ("encyclopedia " * DIRECT_CHARACTERS)[:DIRECT_CHARACTERS],
}


def of_files(folder: Path, files: dict[str, bytes]) -> Any:
    """The tokenizer of a small model whose tokenizer files are these."""
    own = {f.name: f.read_bytes() for f in TINY.iterdir() if "token" not in f.name}
    store = LocalStore(folder)
    for name, data in (own | files).items():
        store.put(name, data)
    return load_tokenizer(open_checkpoint(store), trust_remote_code=True)


def pieces(folder: Path, **marks: bool) -> Any:
    return of_files(folder, pieces_files(WORDS, marks))


def byt5(*more: str, **marks: bool) -> Any:
    """One of transformers' own that is Python, with tokens of ours."""
    from transformers import AddedToken, ByT5Tokenizer

    # its own default for these strips what stands beside them
    own = {f"{t}_token": AddedToken(f"<{t}>", special=True) for t in ("pad", "eos", "unk")}
    tokenizer: Any = ByT5Tokenizer(extra_ids=3, **own)
    tokens = ("<a>", "[x", "x]", "the", *more)
    tokenizer.add_tokens([AddedToken(t, special=True, **marks) for t in tokens])
    return tokenizer


KINDS = (
    *("kimi", "kimi, stripping", "ranks", "fast", "python", "python, within one another"),
    "python, stripping",
)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    marks = {"lstrip": True, "rstrip": True, "single_word": True}
    match request.param:
        case "kimi":
            return pieces(tmp_path / "m")
        case "kimi, stripping":
            return pieces(tmp_path / "m", lstrip=True, rstrip=True)
        case "ranks":
            return of_files(tmp_path / "m", tokenizer_files())
        case "fast":
            return load_tokenizer(open_checkpoint(LocalStore(TINY)), trust_remote_code=False)
        case "python":
            return byt5()
        case "python, within one another":
            return byt5("<a>b", "e<a>", "he")
        case _:
            return byt5(**marks)


def nasty_texts(tokens: list[str], count: int) -> Iterator[str]:
    """Odd texts, and random ones of whole and cut special tokens, glued to all sorts of text."""
    yield from ODD
    draw = random.Random(0)
    bits = [
        *(
            " ",
            "\n",
            "\t\r\n",
            "  ",
            "a",
            "the",
            "B",
            "'s",
            "123",
            "4",
            "中文",
            "你",
            "é",
            "e\u0301",
        ),
        *(
            "🙂",
            "\u200d",
            "\x00",
            "<",
            "|",
            "<|",
            "|>",
            "[",
            "]",
            ">",
            "_",
            "=" * 9,
            "encyclopedia",
        ),
    ]
    for _ in range(count):
        cut = [t[: draw.randrange(1, len(t) + 1)] for t in draw.choices(tokens, k=4)]
        some = bits + cut + draw.choices(tokens, k=6)
        yield "".join(draw.choices(some, k=draw.randrange(1, 40)))


def test_ids_of_nasty_texts_are_those_of_transformers_own_call(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    assert type(encoder) is not Encoder, "a way of its own"
    tokens = [*tokenizer.get_added_vocab(), *NAMED, "<|reserved_277|>", "[BOS]", "<|turn|>"]
    texts = list(nasty_texts(tokens, 300))
    found = encoder.encode(texts)
    for text, ids in zip(texts, found, strict=True):
        assert list(ids) == own_call(tokenizer, text), text


@pytest.mark.parametrize("name", LONG)
def test_ids_of_long_texts_are_those_of_transformers_own_call(tmp_path: Path, name: str) -> None:
    tokenizer = pieces(tmp_path / "m")
    encoder = encoder_of(tokenizer)
    (ids,) = encoder.encode([LONG[name]])
    assert list(ids) == own_call(tokenizer, LONG[name])


def test_kimis_form_is_asked_of_tiktoken_at_once_with_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path / "m")
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, PythonEncoder) and encoder.direct is not None
    text = "<|im_user|>the<|im_end|>[EOS]<think>"
    expected = own_call(tokenizer, text)
    names = ["<|im_user|>", "<|im_end|>", "[EOS]", "<think>"]
    assert set(tokenizer.convert_tokens_to_ids(names)) <= set(expected)
    tokenizer._tokenize = None  # the class is not asked
    assert list(encoder.encode_fast([text])[0]) == expected


@pytest.mark.parametrize(
    ("text", "is_direct"),
    [
        ("", True),
        ("the [BOS]", True),
        ("the <|reserved_%d|>", False),
        ("x" * DIRECT_RUN, True),
        ("x" * (DIRECT_RUN + 1), False),
        ("a" + " " * DIRECT_RUN + "b", True),
        ("a" + " " * (DIRECT_RUN + 1) + "b", False),
        ("a " * (DIRECT_CHARACTERS // 2), True),
        ("a " * (DIRECT_CHARACTERS // 2) + "b", False),
        ("half a pair \ud83d", False),
    ],
)
def test_what_the_class_may_treat_in_another_way_is_left_to_it(
    tmp_path: Path, text: str, is_direct: bool
) -> None:
    tokenizer = pieces(tmp_path / "m")
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, PythonEncoder) and encoder.direct is not None
    text = text.replace("%d", str(len(tokenizer.decoder) - 1))
    assert (encoder.direct.encode(text) is not None) == is_direct
    assert list(encoder.encode_fast([text])[0]) == own_call(tokenizer, text)


def changed(tokenizer: Any, **methods: Any) -> Any:
    """The same tokenizer with methods of its own."""
    tokenizer.__class__ = type("Changed", (type(tokenizer),), methods)
    return tokenizer


def test_class_that_changes_the_text_is_asked_each_time(tmp_path: Path) -> None:
    import unicodedata

    def normal(self: Any, text: str, **_: Any) -> list[str]:
        found = self.encode(unicodedata.normalize("NFC", text))
        return [self.decoder[i] for i in found]

    tokenizer = changed(pieces(tmp_path / "m"), _tokenize=normal)
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, PythonEncoder) and encoder.direct is None
    assert encoder.num_threads == 1
    assert list(encoder.encode(["e\u0301"])[0]) == own_call(tokenizer, "é")


@pytest.mark.parametrize("most", [150_001, 150_002, 150_003, 150_013])
def test_class_that_cuts_shorter_texts_than_kimis_is_asked_each_time(
    tmp_path: Path, most: int
) -> None:
    def short(self: Any, text: str, **_: Any) -> list[str]:
        parts = [text[at : at + most] for at in range(0, len(text), most)]
        return [self.decoder[i] for part in parts for i in self.encode(part)]

    encoder = encoder_of(changed(pieces(tmp_path / "m"), _tokenize=short))
    assert isinstance(encoder, PythonEncoder) and encoder.direct is None


def test_class_that_cuts_shorter_runs_than_kimis_is_asked_each_time(tmp_path: Path) -> None:
    def short(self: Any, text: str, **_: Any) -> list[str]:
        parts = [text[at : at + 19_000] for at in range(0, len(text), 19_000)]
        parts = parts if len(text) <= DIRECT_RUN and " " not in text else [text]
        return [self.decoder[i] for part in parts for i in self.encode(part)]

    encoder = encoder_of(changed(pieces(tmp_path / "m"), _tokenize=short))
    assert isinstance(encoder, PythonEncoder) and encoder.direct is None


@pytest.mark.parametrize("step", ["tokenize", "prepare_for_tokenization", "_encode_plus"])
def test_tokenizer_with_a_step_of_its_own_is_called_text_by_text(tmp_path: Path, step: str) -> None:
    tokenizer = pieces(tmp_path / "m")
    own = getattr(type(tokenizer), step)
    encoder = encoder_of(changed(tokenizer, **{step: lambda *a, **k: own(*a, **k)}))
    assert type(encoder) is Encoder


def test_tokenizer_that_splits_special_tokens_is_called_text_by_text(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path / "m")
    tokenizer.split_special_tokens = True
    encoder = encoder_of(tokenizer)
    text = "a<|im_end|>b"
    assert type(encoder) is Encoder and encoder.encode([text])[0] == own_call(tokenizer, text)


def test_class_that_probes_do_not_see_through_is_found_out_by_its_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All is tokenized again by the own call, and the log says why."""

    def zebra(self: Any, text: str, **_: Any) -> list[str]:
        return [self.decoder[i] for i in self.encode(text.replace("zebra", "the"))]

    tokenizer = changed(pieces(tmp_path / "m"), _tokenize=zebra)
    assert isinstance(encoder_of(tokenizer), PythonEncoder)
    with pytest.raises(TokensDifferError, match="zebra"):
        encoder_of(tokenizer).encode(["a zebra", "b"])
    with caplog.at_level("INFO", "p48ray.progress"):
        found = with_encoder(tokenizer, lambda e: [list(i) for i in e.encode(["a zebra", "b"])])
    assert found == [own_call(tokenizer, "a zebra"), own_call(tokenizer, "b")]
    assert "again, one text at a time: the ids of 'a zebra' differ" in caplog.text


def test_batch_of_a_fast_tokenizer_is_held_against_its_own_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer(open_checkpoint(LocalStore(TINY)), trust_remote_code=False)
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, BatchEncoder)
    assert list(encoder.encode(["a word", ""])[1]) == []
    monkeypatch.setattr(tokenizing, "own_call", lambda *_: [7])
    with pytest.raises(TokensDifferError, match="'a word' differ"):
        encoder.encode(["a word"])


def test_code_of_a_checkpoint_never_runs_in_two_threads(tmp_path: Path) -> None:
    """Where tiktoken is not enough: a special token that is not an added one."""
    tokenizer = pieces(tmp_path / "m")
    encoder = encoder_of(tokenizer)
    text = f"the <|reserved_{len(tokenizer.decoder) - 1}|>"
    expected = own_call(tokenizer, text)
    own, inside, most = tokenizer._tokenize, threading.Semaphore(1), []

    def counted(text: str) -> list[str]:
        most.append(inside.acquire(blocking=False))
        found: list[str] = own(text)
        inside.release()
        return found

    tokenizer._tokenize = counted
    threads = [
        threading.Thread(target=lambda: [encoder.encode_fast([text] * 50) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(most) and len(most) >= 4 * 1000
    tokenizer._tokenize = own
    assert list(encoder.encode([text])[0]) == expected
