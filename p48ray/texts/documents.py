"""Where texts lie and which of them are read: files and folders on a disk, in a bucket, or in a
data set on the Hub.

Texts of up to WHOLE_BYTES (as stored, all files of one source) are read whole, in the order of
their names. Of more than that no more is read than a sample needs: the files, in an order drawn by
the seed, give one part each in turn (parts of a file in a drawn order too: a row group, or 16 MiB
of a .jsonl; an array and what is packed with gzip are one part), and a part gives its documents
until they have VISIT_CHARACTERS; when every part has been visited, each gives twice as many from
where it was left, and so on to the end. A document longer than VISIT_CHARACTERS is cut there. So a
sample is spread over the whole, depends on nothing but the seed and the files, and costs memory for
one document. Who changes any of this changes calibration tokens, and bumps plan.NUMERICS_VERSION.

Rows of no use are skipped and counted (texts.tally); so is what is cut of others.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from p48ray.config.documents import DocumentSource
from p48ray.errors import (
    CalibrationError,
    ConfigError,
    ObjectMissingError,
    RowSkippedError,
    UserError,
)
from p48ray.store.base import ObjectInfo, Store
from p48ray.store.open import open_store, scheme_of
from p48ray.texts.chat import document_of
from p48ray.texts.rows import num_parts, read_part, read_rows
from p48ray.texts.tally import ENOUGH_ROWS, Tally
from p48ray.texts.text_file import PARQUET_ENDINGS, Columns, Row, TextFile

WHOLE_BYTES = 64 * 2**20
VISIT_CHARACTERS = 2**20
FOLDER_ENDINGS = (".jsonl", ".jsonl.gz", ".json.gz", *PARQUET_ENDINGS)
"""Of the files of a folder that are texts, in letters of any case. A .json may as well be settings
or an index: it is read where a path names it."""
DOWNLOAD_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Texts:
    """The files of one source of a mix, in the order of their names. `is_one`: the path names a
    file, not a folder."""

    path: str
    files: tuple[TextFile, ...]
    is_one: bool

    @property
    def num_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    @property
    def is_whole(self) -> bool:
        return self.num_bytes <= WHOLE_BYTES


def open_texts(source: DocumentSource, key: str) -> Texts:
    """The files that a source's path names, with their sizes; no text is read.

    Args:
        key: dotted configuration key, for messages.
    Raises: ConfigError when there are none, or their place can not be reached with what the user
        has set.
    """
    path = source.path.rstrip("/") or source.path
    scheme = scheme_of(path)
    if scheme.is_local:
        path = str(Path(path).expanduser()) if scheme.is_path else open_store(path).uri
        found = (
            _stored(open_store(path), "", path, key)
            if Path(path).is_dir()
            else _one_local(path, key)
        )
        return _of_split(found, source.split, key)
    try:
        found = _stored(*_remote(source, path), path, key)
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error
    return _of_split(found, source.split, key)


def _of_split(texts: Texts, split: str | None, key: str) -> Texts:
    """The files whose name or folder has the word of a split, as data sets name them:
    train-00000-of-00002.parquet, data/train.jsonl, train/0.parquet."""
    if split is None:
        return texts
    if texts.is_one:
        raise ConfigError(
            f"{key}: {texts.path}: split: expected a folder, of whose files {split!r} takes some;"
            " found a file"
        )

    def name(file: TextFile) -> str:
        return file.where.removeprefix(texts.path).lstrip("/")

    word = re.compile(rf"(^|[-._ 0-9/]){re.escape(split)}([-._ 0-9/]|$)")
    files = tuple(file for file in texts.files if word.search(name(file)))
    if not files:
        found = ", ".join(map(name, texts.files[:3]))
        raise ConfigError(
            f"{key}: {texts.path}: split: expected files with {split!r} in their name or folder,"
            f" found {found}"
        )
    return Texts(texts.path, files, is_one=False)


def _remote(source: DocumentSource, path: str) -> tuple[Store, str]:
    """The store of a path that is not this machine's, and the file or folder in it; nobody is
    asked."""
    root, prefix = scheme_of(path).split(path)
    return open_store(root, source.endpoint_url), prefix


def look_at_texts(documents: Sequence[DocumentSource], key: str) -> None:
    """What can be told of texts without reading them: on this machine, that each file is there and
    begins with a record; elsewhere, that the place can be meant.

    Raises: ConfigError or CalibrationError, as reading them would.
    """
    for source in documents:
        if scheme_of(source.path).is_local:
            for file in open_texts(source, key).files:
                next(read_rows(file, key, Columns.of(source)), None)
            continue
        try:
            _remote(source, source.path)
        except UserError as error:
            raise type(error)(f"{key}: {source.path}: {error}") from error


def _one_local(path: str, key: str) -> Texts:
    """A file whatever its name: see texts.rows."""
    file = Path(path)
    try:
        with file.open("rb"):
            size_bytes = file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{key}: {path}: can not be read: {error.strerror}") from None
    return Texts(
        path, (TextFile(open_store(str(file.parent)), file.name, size_bytes, path),), is_one=True
    )


def _stored(store: Store, prefix: str, path: str, key: str) -> Texts:
    """The object at `prefix`, or else every text file below it."""
    held = store.head(prefix) if prefix else None
    infos = [held] if held else list(store.list(f"{prefix}/" if prefix else ""))
    folder = prefix.rpartition("/")[0] if held else prefix

    def shown(info: ObjectInfo) -> str:
        return f"{path}{'' if held else '/' + info.key.removeprefix(folder).lstrip('/')}"

    names = [
        i
        for i in infos
        if held
        or (
            i.key.lower().endswith(FOLDER_ENDINGS)
            and not any(p.startswith(".") for p in i.key.split("/"))
        )
    ]
    if not names:
        found = ", ".join(i.key for i in infos[:3]) or "nothing"
        where = f"{key}: {path}" if scheme_of(path).is_local else path
        hint = (
            "; a .json is read where the path names it, not its folder"
            if any(i.key.lower().endswith(".json") for i in infos)
            else ""
        )
        raise ConfigError(
            f"{where}: expected a file, or a folder with {', '.join(FOLDER_ENDINGS)} files in it,"
            f" found {found}{hint}"
        )
    return Texts(
        path,
        tuple(TextFile(store, i.key, i.size_bytes, shown(i)) for i in names),
        is_one=held is not None,
    )


def digest_documents(documents: Sequence[DocumentSource], key: str) -> str:
    """SHA-256 over the weights, how each source is read, and the identity of every file, in the
    order of the mix: the identity of the texts, wherever they lie.

    Of a single file that is read whole, and of every local file, its bytes; of others in a bucket
    or on the Hub, name, size, and the digest that the store keeps (SHA-256, git's, or an ETag),
    because tens of gigabytes are not read for it.
    """
    digest = hashlib.sha256()
    for document in documents:
        texts = open_texts(document, key)
        digest.update(f"{_reading(document)}\n".encode())
        if texts.is_one and (texts.is_whole or scheme_of(texts.path).is_local):
            (file,) = texts.files
            digest.update(f"{document.weight!r} {file.size_bytes}\n".encode())
            for data in _stream(file, key):
                digest.update(data)
            continue
        digest.update(f"{document.weight!r} {len(texts.files)} files\n".encode())
        for file in texts.files:
            name = file.where.removeprefix(texts.path).lstrip("/")
            digest.update(
                f"{name} {file.size_bytes} {_identity(file, texts.is_whole, key)}\n".encode()
            )
    return digest.hexdigest()


def _reading(source: DocumentSource) -> str:
    """How rows become documents. (A split shows in the files; how many rows may be skipped changes
    no text.)"""
    facts = source.model_dump(mode="json", include={"columns", "reasoning", "template_arguments"})
    return json.dumps(facts, sort_keys=True)


def _identity(file: TextFile, is_whole: bool, key: str) -> str:
    """SHA-256 of a file's bytes, as the store tells it or counted here; for what is too large to be
    read whole, whatever the store tells."""
    scheme = scheme_of(file.store.uri)
    if (scheme.lists_digests or not is_whole) and (found := scheme.identity(file.store, file.key)):
        return found
    digest = hashlib.sha256()
    for data in _stream(file, key):
        digest.update(data)
    return digest.hexdigest()


def _stream(file: TextFile, key: str) -> Iterator[bytes]:
    try:
        for start in range(0, file.size_bytes, DOWNLOAD_BYTES):
            yield file.store.get_range(
                file.key, start, min(DOWNLOAD_BYTES, file.size_bytes - start)
            )
    except ObjectMissingError as error:
        raise ConfigError(f"{key}: {file.where}: can not be read: {error}") from error


def read_documents(
    source: DocumentSource,
    key: str,
    seed: int = 0,
    tokenizer: Any = None,
    tally: Tally | None = None,
) -> Iterator[str]:
    """The texts of one source, rows of no use skipped: all of them, or of more than WHOLE_BYTES in
    the order of the sample that this module describes.

    Args:
        source: with the path of the texts.
        key: dotted configuration key, for messages.
        seed: draws the sample; without effect on texts that are read whole.
        tokenizer: renders chats; without one they are refused.
        tally: counts what is read and skipped.
    Raises: CalibrationError naming file, line or row, and column, when more is skipped than the
        source allows: at the end, and of a sample after ENOUGH_ROWS too.
    """
    reading = _Reading(source, key, tokenizer, tally if tally is not None else Tally())
    texts = open_texts(source, key)
    if texts.is_whole:
        rows = (row for file in texts.files for row in read_rows(file, key, reading.columns))
        yield from (text for row in rows if (text := reading.text(row)))
    else:
        yield from _sampled(texts, reading, seed)
    reading.tally.check(source)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What turns rows of one source into documents, and counts them."""

    source: DocumentSource
    key: str
    tokenizer: Any
    tally: Tally

    @property
    def columns(self) -> Columns:
        return Columns.of(self.source)

    def text(self, row: Row, most: int | None = None, is_new: bool = True) -> str:
        """The document of a row, "" for one that is skipped.

        Args:
            row: the record.
            most: characters after which the document is cut.
            is_new: it was not counted before.
        """
        tally = self.tally if is_new else Tally()
        try:
            document = document_of(row, self.source, self.tokenizer)
        except RowSkippedError as error:
            tally.skip(row.where, error)
            return ""
        text, cut = document.text[:most], document.cut
        if len(text) < len(document.text):
            cut = {*cut, f"longer than {most:,} characters"}
        tally.take(text, cut)
        return text


def _sampled(texts: Texts, reading: _Reading, seed: int) -> Iterator[str]:
    """Documents of more text than is read, visit by visit."""
    visits: list[tuple[TextFile, int]] | None = None
    start, count = 0, VISIT_CHARACTERS
    while True:
        is_over = True
        seen: list[tuple[TextFile, int]] = []
        for file, part in visits if visits is not None else _rotation(texts.files, reading, seed):
            seen.append((file, part))
            for text in _window(file, part, start, start + count, reading):
                is_over = False
                yield text
        if is_over:
            return
        visits, start, count = seen, start + count, 2 * count


def _rotation(
    files: Sequence[TextFile], reading: _Reading, seed: int
) -> Iterator[tuple[TextFile, int]]:
    """Every part of every file, one of each file in turn. A file is looked into when its first turn
    comes."""
    generator = torch.Generator().manual_seed(seed)
    waiting = [files[i] for i in torch.randperm(len(files), generator=generator).tolist()]
    queues: list[tuple[TextFile, list[int]]] = []
    for file in waiting:
        count = num_parts(file, reading.key, reading.columns)
        parts = torch.randperm(count, generator=generator).tolist()
        queues.append((file, parts[1:]))
        yield from ((file, part) for part in parts[:1])
    while queues:
        queues = [(file, parts) for file, parts in queues if parts]
        for at, (file, parts) in enumerate(queues):
            yield file, parts[0]
            queues[at] = (file, parts[1:])


def _window(file: TextFile, part: int, start: int, end: int, reading: _Reading) -> Iterator[str]:
    """Documents of a part that begin at character `start` of it or later, and before `end`. Rows
    before `start` were counted by the visit before."""
    position = 0
    for row in read_part(file, part, reading.key, reading.columns):
        is_new = position >= start
        text = reading.text(row, VISIT_CHARACTERS, is_new)
        if reading.tally.rows >= ENOUGH_ROWS:
            reading.tally.check(reading.source)
        if not text:
            continue
        if is_new:
            yield text
        position += len(text)
        if position >= end:
            return


def too_little(
    source: DocumentSource, key: str, share: int, length: int, found: int, tally: Tally
) -> CalibrationError:
    """The error of a source that holds less text than its share of the mix.

    Args:
        source: the one that is short of text.
        key: dotted configuration key that ends in ".documents", for the message.
        share: sequences that were wanted of it.
        length: tokens a sequence.
        found: sequences that its text makes.
        tally: of its rows.
    """
    section = key.removesuffix(".documents")
    return CalibrationError(
        f"{key}: {source.path}: expected text for {share} sequences of {length} tokens, found"
        f" {found} in {tally.documents:,} documents ({tally.rows:,} rows, skipped:"
        f" {tally.spell_skipped()}); add text or lower {section}.num_sequences"
    )
