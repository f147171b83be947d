"""A file of texts, its records, and how much one of them may take."""

import io
from dataclasses import dataclass
from typing import Any

from p48ray.config.documents import DocumentSource
from p48ray.store.base import Store

READ_BYTES = 2**20
MAX_ROW_BYTES = 64 * 2**20
"""Of a line, of an object in an array, and of what a row of Parquet decodes to."""
MAX_EXPANSION = 100
"""What unpacks to more than so many times what is stored is no text, unless it is small."""
PARQUET_ENDINGS = (".parquet", ".pq")


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of records. `where`: how messages name it."""

    store: Store
    key: str
    size_bytes: int
    where: str

    def ends_with(self, *endings: str) -> bool:
        """Whether its name does, in letters of any case."""
        return self.key.lower().endswith(endings)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that are read. Of `chats`, then `texts`, the first that a record has
    filled is its document; `tools` and `system` belong to a chat."""

    chats: tuple[str, ...] = ("messages", "conversations")
    texts: tuple[str, ...] = ("text",)
    tools: str = "tools"
    system: str = "system"

    @classmethod
    def of(cls, source: DocumentSource) -> "Columns":
        """Those that a source names. One that names a chat or a text has no other."""
        named = source.columns or {}
        is_bare = not named.keys() & {"messages", "text"}
        return cls(
            chats=(named["messages"],) if "messages" in named else cls().chats if is_bare else (),
            texts=(named["text"],) if "text" in named else cls().texts if is_bare else (),
            tools=named.get("tools", "tools"),
            system=named.get("system", "system"),
        )

    @property
    def documents(self) -> tuple[str, ...]:
        return (*self.chats, *self.texts)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.documents, *((self.tools, self.system) if self.chats else ()))

    def __str__(self) -> str:
        """As messages have it."""
        return " or ".join(f"'{name}'" for name in self.documents)


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and how messages name its place."""

    where: str
    values: dict[str, Any]


class RangeReader(io.RawIOBase):
    """A file of a store as Python's file object, read by ranges."""

    def __init__(self, file: TextFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size_bytes}[
            whence
        ]
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.file.size_bytes - self.position)
        num_bytes = left if size is None or size < 0 else min(size, left)
        data = (
            self.file.store.get_range(self.file.key, self.position, num_bytes) if num_bytes else b""
        )
        self.position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
