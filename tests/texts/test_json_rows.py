"""Texts in JSON: by lines and in arrays, as they are and packed, with and without a byte order
mark."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, ConfigError
from p48ray.store import MemoryStore
from p48ray.texts import documents, json_rows
from p48ray.texts.documents import read_documents
from tests.conftest import REPO

KEY = "calibration.documents"
BOM = b"\xef\xbb\xbf"
TEXTS = ["one", 'zwei, "]" \n}{ ünd', "three\\", "x" * 50, "\U0001f642" * 9]
LINES = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
ARRAY = json.dumps([{"text": t, "meta": [{}]} for t in TEXTS], ensure_ascii=False).encode()
PRETTY = json.dumps([{"text": t} for t in TEXTS], indent=2).encode()


def table() -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": TEXTS}), sink)
    return sink.getvalue().to_pybytes()


FORMS = {
    "a.jsonl": LINES,
    "A.JSONL": BOM + LINES,
    "a.json": LINES,
    "b.json": ARRAY,
    "B.Json": b"\r\n \t" + PRETTY + b"\n",
    "c.json": BOM + PRETTY,
    "d.json": BOM + LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.json.gz": gzip.compress(LINES, mtime=0),
    "A.JSONL.GZ": gzip.compress(BOM + LINES, mtime=0),
    "b.json.gz": gzip.compress(ARRAY, mtime=0),
    "two members.jsonl.gz": gzip.compress(LINES[:40], mtime=0) + gzip.compress(LINES[40:], mtime=0),
    "padded.jsonl.gz": gzip.compress(LINES, mtime=0) + bytes(100),
    "a.parquet": table(),
    "X.PARQUET": table(),
    "a.pq": table(),
    "any name": LINES,
    "empty.json": b"[]",
}


def read(path: object) -> list[str]:
    return list(read_documents(DocumentSource(path=str(path)), KEY, 0))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("read_bytes", [1, 7, 2**20])
def test_every_form_gives_the_same_texts_from_a_disk_and_from_a_store(
    name: str, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "READ_BYTES", read_bytes)
    expected = TEXTS if name != "empty.json" else []
    (tmp_path / name).write_bytes(FORMS[name])
    MemoryStore("forms").put(name, FORMS[name])
    assert read(tmp_path / name) == expected
    assert read(f"memory://forms/{name}") == expected
    monkeypatch.setattr(documents, "WHOLE_BYTES", -1)
    monkeypatch.setattr(json_rows, "SPAN_BYTES", 30)
    assert sorted(read(tmp_path / name)) == sorted(expected), "as parts of a large source"


def test_folder_gives_texts_of_every_ending_but_json(tmp_path: Path) -> None:
    for name in ("A.JSONL.GZ", "X.PARQUET", "a.json.gz", "a.jsonl", "a.pq"):
        (tmp_path / name).write_bytes(FORMS[name])
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert read(tmp_path) == 5 * TEXTS


def test_folder_of_json_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(ARRAY)
    words = r"found train\.json; a \.json is read where the path names it, not its folder"
    with pytest.raises(ConfigError, match=words):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b"[1, 2]", r"object 1 of the array: expected a JSON object, found '1, 2\]'"),
        (
            "a.json",
            b'[{"text": "a"}, {"txt": "b"}]',
            r"object 2 of the array: expected a column .*, found txt",
        ),
        ("a.json", b'[{"text": "a"},]', r"object 2 of the array: .*found '\]'"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"end after object 1 .* comma, found '\{\"te"),
        ("a.json", b'[{"text": "a"}', r"to end after object 1 .*, found ''"),
        ("a.json", b'[{"text": "a"}]\n[]', r"to end after object 1 .*, found '\[\]'"),
        ("a.json", b'[{"text": "a', r"object 1 of the array: .*found '\{\"text\": \"a'"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"a\.json: not UTF-8 \(byte 14\)"),
        ("a.json", b'[{"text": [' + b"[" * 10**5, r"object 1 of the array: expected a JSON"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"line 1: expected a column .*, found data"),
        ("a.jsonl", b"[1]", r"line 1: expected a JSON object, found b'\[1\]'"),
        ("a.jsonl", b'{"text": "a"}\n' + BOM + b'{"text": "b"}\n', r"line 2: expected a JSON"),
        ("a", table(), r"line 1: expected JSON in UTF-8, found Parquet: its name has to end in"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), r"found gzip: its name has to end in \.gz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd more", r"found zstd: unpack it, or pack it with gzip"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: can not be unpacked with gzip: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:-20],
            r"can not be unpacked with gzip: .*ended",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:30] + b"\xff" * 30,
            r"a\.jsonl\.gz: can not be unpacked with gzip: ",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"words", mtime=0),
            r"a\.jsonl\.gz, line 1: expected a JSON object",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_place(
    name: str, data: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=words) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{KEY}: {tmp_path}/{name}")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_object_without_end_is_refused_before_it_fills_the_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_rows, "READ_BYTES", 16)
    data = b'[{"text": "' + bytes(random.Random(0).choices(b"abc", k=10**5))
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    words = r"object 1 of the array: expected a JSON object of at most 100 characters, found '\{"
    with pytest.raises(CalibrationError, match=words):
        read(tmp_path / name)


READ = """
import resource, sys
from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError
from p48ray.texts.documents import read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sum(len(text) for text in read_documents(DocumentSource(path=sys.argv[1]), "key")))
except CalibrationError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def read_elsewhere(path: Path) -> tuple[str, int]:
    """What another process says of a file, and megabytes of memory that it took for it."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
        timeout=200,
    )
    said, megabytes = done.stdout.splitlines()
    return said, int(megabytes)


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"\n", b"x"], ids=["empty lines", "one line"])
def test_packed_file_that_unpacks_to_no_text_is_refused_within_memory(
    data: bytes, tmp_path: Path
) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        for _ in range(1024):
            file.write(data * 2**20)
    said, megabytes = read_elsewhere(tmp_path / "a.jsonl.gz")
    assert said.startswith(f"key: {tmp_path}/a.jsonl.gz: ")
    if data == b"\n":
        assert "expected text that unpacks to at most 100 times what is stored, found 1" in said
    else:
        assert "the line at byte 0 is longer than 67108864 bytes" in said
    assert megabytes < 400


@pytest.mark.slow
def test_large_array_is_read_an_object_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("w") as file:
        file.write("[")
        for i in range(60_000):
            file.write(("," if i else "") + json.dumps({"text": "x" * 1000}))
        file.write("]")
    said, megabytes = read_elsewhere(tmp_path / "a.json")
    assert said == "60000000" and megabytes < 60
