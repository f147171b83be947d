"""Where texts may lie and in which forms, what is read of a large source, and what is refused with
which words."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pytest
import torch
from pyarrow import parquet

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, ConfigError
from p48ray.store import LocalStore, MemoryStore
from p48ray.texts import documents, json_rows, parquet_rows
from p48ray.texts.documents import digest_documents, open_texts, read_documents
from p48ray.texts.rows import num_parts, read_part, read_rows
from p48ray.texts.sequences import load_sequences
from p48ray.texts.text_file import Columns, TextFile
from tests.conftest import REPO

KEY = "calibration.documents"


class Chat:
    """A tokenizer of one id a character below 128, with a chat template in words."""

    bos_token_id, bos_token, chat_template = 1, "^", "words"

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and not add_generation_prompt
        if any(m["content"] == "!" for m in messages):
            raise ValueError("no exclamations")
        return "^" + "".join(f"<{m['role']}>{m['content']}" for m in messages)


def source(path: object, weight: float = 1.0) -> DocumentSource:
    return DocumentSource(path=str(path), weight=weight)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(
    path: Path, rows: list[dict[str, Any]], group: int = 1000, **types: pyarrow.DataType
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pyarrow.Table.from_pylist(rows)
    for name, kind in types.items():
        made = made.set_column(made.schema.get_field_index(name), name, made[name].cast(kind))
    parquet.write_table(made, path, row_group_size=group)
    return path


def read(path: object, tokenizer: Any = None, seed: int = 0) -> list[str]:
    return list(read_documents(source(path), KEY, seed, tokenizer))


# Forms.

TEXTS = ["one", "zwei\nünd", "  ", "three"]
KEPT = ["one", "zwei\nünd", "three"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_texts_are_those_of_the_same_jsonl(tmp_path: Path, kind: pyarrow.DataType) -> None:
    rows = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
    a = read(table(tmp_path / "a.parquet", rows, group=2, text=kind))
    assert a == read(jsonl(tmp_path / "b.jsonl", *rows)) == KEPT


MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]
TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": MESSAGES}, "<system>s<user>u<assistant>a"),
        ({"conversations": TURNS}, "<user>u<assistant>a"),
        ({"system": "s", "conversations": TURNS}, "<system>s<user>u<assistant>a"),
        ({"text": "plain", "messages": MESSAGES}, "<system>s<user>u<assistant>a"),
        ({"text": "plain", "messages": []}, "plain"),
        ({"text": "plain", "messages": None}, "plain"),
        ({"text": None, "messages": MESSAGES}, "<system>s<user>u<assistant>a"),
        ({"conversations": MESSAGES}, "<system>s<user>u<assistant>a"),
        ({"messages": TURNS}, "<user>u<assistant>a"),
        ({"messages": json.dumps(TURNS)}, "<user>u<assistant>a"),
        ({"messages": MESSAGES[:1], "conversations": TURNS}, "<system>s"),
    ],
)
def test_chats_go_through_the_template_and_bos_is_left_to_packing(
    tmp_path: Path, suffix: str, row: dict[str, Any], text: str
) -> None:
    path = (
        jsonl(tmp_path / "a.jsonl", row)
        if suffix == "jsonl"
        else table(tmp_path / "a.parquet", [row])
    )
    assert read(path, Chat()) == [text]


def test_parts_of_a_message_are_joined_and_a_chat_without_turns_is_skipped(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    path = jsonl(
        tmp_path / "a.jsonl", {"messages": []}, {"messages": [{"role": "user", "content": parts}]}
    )
    assert read(path, Chat()) == ["<user>uv"]


class NoTemplate(Chat):
    chat_template = None


@pytest.mark.parametrize(
    ("row", "tokenizer", "words"),
    [
        (
            {"messages": "hello"},
            Chat(),
            "'messages': expected a list of objects, or it as JSON, found 'hello'",
        ),
        ({"messages": ["hello"]}, Chat(), "'messages': expected a list of objects, found a list"),
        (
            {"messages": [{"role": "user"}]},
            Chat(),
            r"messages\[0\].content: expected a text, found null",
        ),
        (
            {"messages": [{"content": "u"}]},
            Chat(),
            r"messages\[0\].role: expected a text, found null",
        ),
        (
            {"conversations": [{"from": "ghost", "value": "u"}]},
            Chat(),
            r"conversations\[0\].from: expected one of .*human.*, found 'ghost'",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            Chat(),
            r"conversations\[0\].value: expected a text or a list of parts, found a number",
        ),
        (
            {"messages": [{"role": "user", "content": "!"}]},
            Chat(),
            "'messages': expected a chat that the tokenizer's chat template takes, found"
            " ValueError: no exclamations",
        ),
        (
            {"messages": MESSAGES},
            NoTemplate(),
            "'messages' holds a chat, and the source's tokenizer has no chat template",
        ),
        ({"text": 3}, Chat(), "'text': expected a text, found a number"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_bad_record_is_refused_by_file_place_and_column(
    tmp_path: Path, suffix: str, row: dict[str, Any], tokenizer: Any, words: str
) -> None:
    good = {name: [] if isinstance(value, list) else value for name, value in row.items()}
    if suffix == "jsonl":
        path, place = jsonl(tmp_path / "a.jsonl", {"text": "fine"}, row), "line 2"
    elif row.get("messages") == ["hello"]:
        return  # not a type that a column may have beside objects
    else:
        path, place = (
            table(tmp_path / "a.parquet", [row if good == row else good, row]),
            "row 1" if good == row else "row 2",
        )
    with pytest.raises(
        CalibrationError, match=rf"calibration\.documents: .*a\.{suffix}, {place}: .*{words}"
    ):
        read(path, tokenizer)


def test_parquet_text_that_is_absent_or_not_utf8_is_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"a\.parquet, row 3: 'text': expected a text or a chat, found null"
    ):
        read(table(tmp_path / "a.parquet", [{"text": "a"}, {"text": "b"}, {"text": None}], group=1))
    array = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": array}), tmp_path / "b.parquet")
    with pytest.raises(
        CalibrationError, match=r"b\.parquet, row 2: 'text' is not UTF-8 \(byte 0\)"
    ):
        read(tmp_path / "b.parquet")


CHATS = "messages"
MEGABYTE = "z" * 2**20


def repeated(count: int, text: str) -> pyarrow.Array:
    """One chat of `count` messages that all name one value of a dictionary."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count), pyarrow.array([text]))
    messages = pyarrow.StructArray.from_arrays([values], ["content"])
    return pyarrow.ListArray.from_arrays([0, count], messages)


def nothings(count: int) -> pyarrow.Array:
    """One chat of `count` messages that are null."""
    return pyarrow.ListArray.from_arrays([0, count], pyarrow.nulls(count, "string"))


HUGE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "alone": (
        lambda: {"text": ["x" * 200 * 2**20]},
        r"row 1: expected at most 67108864 bytes a row, found 2097\d+ in 1, which are stored in",
    ),
    "among small ones": (
        lambda: {"text": [*["small"] * 40, "x" * 600 * 2**20]},
        r"rows 1 to 41: expected at most 67108864 bytes a row, found 6291\d+ in 41, which are",
    ),
    "of some pages": (
        lambda: {"text": ["small", "small", "x" * 100 * 2**20, "small"]},
        r"row 3: expected at most 67108864 bytes, found 104857600$",
    ),
    "by repetition": (
        lambda: {CHATS: repeated(3000, MEGABYTE)},
        r"row 1: expected at most 67108864 bytes, found 3145728000$",
    ),
    "of nothing": (
        lambda: {CHATS: nothings(2**26 + 1)},
        r"row 1: expected at most 67108864 values in lists, found 67108865$",
    ),
}


READ_HUGE = """
import resource, sys
from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError
from p48ray.texts.documents import read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for _ in read_documents(DocumentSource(path=sys.argv[1]), "key"):
        pass
except CalibrationError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_huge_row_of_a_small_parquet_is_refused_by_row_within_memory(
    name: str, tmp_path: Path
) -> None:
    """Read by another process, whose peak is its own."""
    make, words = HUGE[name]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(make()), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2**21
    done = subprocess.run(
        [sys.executable, "-c", READ_HUGE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
        timeout=100,
    )
    *said, megabytes = done.stdout.splitlines()
    assert re.search(f"^key: {path}, {words}", "\n".join(said)), done.stdout
    assert int(megabytes) < 600


def test_rows_of_large_row_groups_are_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary's value may be named by every row: 64 of them at once would be 64 times it."""
    rows = [{"text": f"{i % 7}" * 50} for i in range(200)]
    chats = [{"messages": [{"role": "user", "content": row["text"]}]} for row in rows]
    flat = table(tmp_path / "a.parquet", rows, group=100)
    nested = table(tmp_path / "b.parquet", chats, group=100)
    expected = read(flat), read(nested, Chat())
    monkeypatch.setattr(parquet_rows, "MAX_ROW_BYTES", 120)
    assert (read(flat), read(nested, Chat())) == expected
    monkeypatch.setattr(parquet_rows, "MAX_ROW_BYTES", 49)
    for path in (flat, nested):
        with pytest.raises(CalibrationError, match=r"row 1: expected at most 49 bytes, found 5\d"):
            read(path, Chat())


def test_file_that_is_no_parquet_or_has_no_column_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CalibrationError, match=r"a\.parquet: not a Parquet file"):
        read(tmp_path / "a.parquet")
    table(tmp_path / "b.parquet", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(
        CalibrationError,
        match=(
            r"b\.parquet: expected a column 'messages' or 'conversations' or 'text', found prompt,"
            r" answer"
        ),
    ):
        read(tmp_path / "b.parquet")
    whole = table(tmp_path / "c.parquet", [{"text": str(i) * 50} for i in range(200)])
    data = bytearray(whole.read_bytes())
    data[20:200] = bytes(180)
    whole.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"c\.parquet"):
        read(whole)


# Places.


def test_folder_gives_its_text_files_by_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "b.jsonl", {"text": "b"})
    table(tmp_path / "d" / "a" / "x.parquet", [{"text": "a"}])
    jsonl(tmp_path / "d" / ".cache" / "z.jsonl", {"text": "hidden"})
    (tmp_path / "d" / "README.md").write_text("no text")
    assert read(tmp_path / "d") == ["a", "b"]
    assert read(f"file://{tmp_path}/d") == ["a", "b"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    assert read("~/a.jsonl") == ["a"]


@pytest.mark.parametrize(
    "path", ["memory://texts/d", "memory://texts/d/", "memory://texts/d/a.jsonl"]
)
def test_file_and_folder_of_a_store_are_told_apart(path: str) -> None:
    store = MemoryStore("texts")
    store.put("d/a.jsonl", b'{"text": "a"}\n')
    store.put("d2/b.jsonl", b'{"text": "b"}\n')
    assert read(path) == ["a"]


def test_place_without_texts_is_refused_by_key_and_path(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_text("no text")
    with pytest.raises(
        ConfigError,
        match=(
            r"calibration\.documents: .*d: expected a file, or a folder with \.jsonl, .*,"
            r" \.pq files in it, found README.md$"
        ),
    ):
        read(tmp_path / "d")
    with pytest.raises(
        ConfigError,
        match=r"calibration\.documents: memory://texts/nowhere: expected a file, or a folder",
    ):
        read("memory://texts/nowhere")
    with pytest.raises(ConfigError, match=r"calibration\.documents: gs://bucket: unknown scheme"):
        read("gs://bucket/a.jsonl")
    with pytest.raises(
        ConfigError, match=r"calibration\.documents: hf://owner/name: expected hf://datasets"
    ):
        read("hf://owner/name")


def test_digest_of_a_folder_covers_names_sizes_bytes_and_weight(tmp_path: Path) -> None:
    def digest(weight: float = 1.0) -> str:
        return digest_documents([source(tmp_path / "d", weight)], KEY)

    jsonl(tmp_path / "d" / "a.jsonl", {"text": "one"})
    found = {digest(), digest(2.0)}
    (tmp_path / "d" / "a.jsonl").rename(tmp_path / "d" / "b.jsonl")
    found.add(digest())
    jsonl(tmp_path / "d" / "b.jsonl", {"text": "two"})
    found.add(digest())
    jsonl(tmp_path / "d" / "c.jsonl")
    found.add(digest())
    assert len(found) == 5
    (tmp_path / "d").rename(tmp_path / "e")
    assert digest_documents([source(tmp_path / "e")], KEY) in found, "wherever they lie"


def test_digest_of_one_file_is_the_same_in_a_store(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})
    MemoryStore("digest").put("x/a.jsonl", path.read_bytes())
    assert digest_documents([source("memory://digest/x/a.jsonl")], KEY) == digest_documents(
        [source(path)], KEY
    )


# Parts and lines.


@pytest.mark.parametrize("span", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("ends", [True, False])
def test_spans_of_a_jsonl_give_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int, ends: bool
) -> None:
    monkeypatch.setattr(json_rows, "SPAN_BYTES", span)
    monkeypatch.setattr(json_rows, "READ_BYTES", 5)
    lines = (
        [json.dumps({"text": "x" * n}) for n in (0, 1, 5, 40, 3)]
        + [""]
        + [json.dumps({"text": "last"})]
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + ("\n" if ends else ""))
    file = TextFile(
        LocalStore(tmp_path), "a.jsonl", (tmp_path / "a.jsonl").stat().st_size, "a.jsonl"
    )
    parts = [
        [row.values["text"] for row in read_part(file, part, KEY, Columns())]
        for part in range(num_parts(file, KEY, Columns()))
    ]
    assert (
        [t for part in parts for t in part]
        == [row.values["text"] for row in read_rows(file, KEY, Columns())]
        == ["x" * n for n in (0, 1, 5, 40, 3)] + ["last"]
    )


def test_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_rows, "READ_BYTES", 64)
    (tmp_path / "a.jsonl").write_text("x" * 1000)
    with pytest.raises(
        CalibrationError, match=r"a\.jsonl: the line at byte 0 is longer than 100 bytes"
    ):
        read(tmp_path / "a.jsonl")


# Large sources.


class Counting(LocalStore):
    """Counts the bytes that are read by file."""

    read_bytes: ClassVar[Counter[str]] = Counter()

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        Counting.read_bytes[key] += num_bytes
        return super().get_range(key, start, num_bytes)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six files of 40 documents of 20 letters in parts of 10, where 2,000 bytes are large and a
    visit takes 60 characters."""
    monkeypatch.setattr(documents, "WHOLE_BYTES", 2000)
    monkeypatch.setattr(documents, "VISIT_CHARACTERS", 60)
    monkeypatch.setattr(json_rows, "SPAN_BYTES", 400)
    monkeypatch.setattr(json_rows, "READ_BYTES", 100)
    monkeypatch.setattr(documents, "open_store", lambda path, *_: Counting(path))
    Counting.read_bytes = Counter()
    for f in range(6):
        rows = [{"text": f"{f}:{i:03d}:" + "abcdefghijklmn"} for i in range(40)]
        if f % 2:
            table(tmp_path / "d" / f"{f}.parquet", rows, group=10)
        else:
            jsonl(tmp_path / "d" / f"{f}.jsonl", *rows)
    return tmp_path / "d"


def test_large_source_gives_every_document_once_when_read_to_its_end(large: Path) -> None:
    found = read(large)
    assert sorted(found) == sorted(
        f"{f}:{i:03d}:abcdefghijklmn" for f in range(6) for i in range(40)
    )


def test_sample_of_a_large_source_is_spread_over_its_files_and_parts(large: Path) -> None:
    texts = read_documents(source(large), KEY, 3)
    first = [next(texts) for _ in range(18)]  # three documents a visit
    assert {t[0] for t in first} == set("012345"), "one part of each file in the first turn"
    assert max(Counter(t[0] for t in first).values()) == 3
    more = first + [next(texts) for _ in range(18)]
    assert max(Counter((t[0], int(t[2:5]) // 10) for t in more).values()) <= 6


def test_sample_follows_the_seed_alone(large: Path, tmp_path: Path) -> None:
    def draw(seed: int, folder: Path = large) -> list[str]:
        texts = read_documents(source(folder), KEY, seed)
        return [next(texts) for _ in range(30)]

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4
    large.rename(tmp_path / "moved")
    assert draw(3, tmp_path / "moved") == draw(3, tmp_path / "moved")


def test_no_more_is_read_of_a_large_source_than_the_sample_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 MB in 12 files of which two sequences are wanted."""
    monkeypatch.setattr(documents, "WHOLE_BYTES", 10**6)
    monkeypatch.setattr(documents, "open_store", lambda path, *_: Counting(path))
    Counting.read_bytes = Counter()
    generator = torch.Generator().manual_seed(0)
    for f in range(12):
        letters = torch.randint(
            97, 123, (2000, 1000), generator=generator, dtype=torch.uint8
        ).numpy()
        table(
            tmp_path / "d" / f"{f:02d}.parquet",
            [{"text": bytes(row).decode()} for row in letters],
            group=200,
        )
    rows = load_sequences([source(tmp_path / "d")], Chat(), 2, 500, 0, 128, "calibration")
    assert rows.shape == (2, 500)
    assert sum(Counting.read_bytes.values()) < 3 * 10**6
    assert len(Counting.read_bytes) < 3


def test_large_sequences_are_drawn_by_the_seed_and_are_enough(large: Path) -> None:
    def draw(seed: int) -> torch.Tensor:
        return load_sequences([source(large)], Chat(), 8, 16, seed, 128, "calibration")

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with pytest.raises(
        CalibrationError,
        match=(
            r"calibration\.documents: .*d: expected text for 1000 sequences of 16 tokens, found"
            r" 315 in 240 documents \(240 rows, skipped: none\); add text"
        ),
    ):
        load_sequences([source(large)], Chat(), 1000, 16, 0, 128, "calibration")


def test_document_that_is_over_long_is_cut_in_a_large_source_and_whole_in_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x" * 5000})
    assert [len(t) for t in read(path)] == [5000]
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "VISIT_CHARACTERS", 1000)
    assert [len(t) for t in read(path)] == [1000]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_bad_record_of_a_large_source_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(json_rows, "SPAN_BYTES", 100)
    rows: list[dict[str, Any]] = [{"text": "x" * 50}] * 10 + [{"text": None}]
    path = (
        jsonl(tmp_path / "a.jsonl", *rows)
        if suffix == "jsonl"
        else table(tmp_path / "a.parquet", rows, group=2)
    )
    place = f"line at byte {63 * 10}" if suffix == "jsonl" else "row 11"
    with pytest.raises(
        CalibrationError,
        match=rf"a\.{suffix}, {place}: 'text': expected a text or a chat, found null \(the first",
    ):
        read(path)


def test_identity_of_a_large_file_on_disk_is_its_bytes(large: Path) -> None:
    path = large / "0.jsonl"
    jsonl(path, *({"text": f"{i:050d}"} for i in range(100)))
    assert not open_texts(source(path), KEY).is_whole
    before = digest_documents([source(path)], KEY)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert digest_documents([source(path)], KEY) != before
