"""Tensors of one row per token as Arrow IPC: readable by anything that speaks Arrow, and back into
torch without a copy.

A 2-D tensor becomes a FixedSizeList column, a 1-D tensor a plain one. bf16 has no Arrow type, so
its bits travel as uint16; the field's metadata says so. The schema's metadata says what the file
is: its kind, layer, part and plan.

    [magic][schema][where the columns lie][column][column] ... [footer]

The brackets without a column are made by pyarrow.

Encoding makes only what lies around the columns. Their own bytes are handed to the store from where
they are: a column on a GPU leaves it piece by piece, while the piece before is hashed and written
(unit.staging).
"""

import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import torch
from torch import Tensor

from p48ray.errors import ShardCorruptError

BITS = {torch.bfloat16: torch.uint16}
TORCH_DTYPE = b"torch_dtype"
ARROW_TYPES = {
    torch.uint8: pa.uint8(),
    torch.int8: pa.int8(),
    torch.int16: pa.int16(),
    torch.uint16: pa.uint16(),
    torch.int32: pa.int32(),
    torch.int64: pa.int64(),
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
}

Chunks = Callable[[Tensor], Iterator[memoryview]]
"""The bytes of a contiguous tensor, in order; each piece is valid until the next one is asked for.
"""


def host_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Of a tensor on the CPU: its own memory."""
    yield tensor.reshape(-1).view(torch.uint8).numpy().data


class ArrowFile:
    """One Arrow IPC file, as `store.base.Buffers`: what pyarrow wrote around the columns, and the
    columns where they are."""

    def __init__(self, pieces: list[bytes | Tensor], chunks: Chunks) -> None:
        self.pieces, self.chunks = pieces, chunks
        self.size_bytes = sum(len(p) if isinstance(p, bytes) else p.nbytes for p in pieces)

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            if isinstance(piece, bytes):
                yield memoryview(piece)
            else:
                yield from self.chunks(piece)

    def to_bytes(self) -> bytes:
        """The whole file, joined: for small ones."""
        return b"".join(bytes(buffer) for buffer in self)


class Sink:
    """What pyarrow writes a file to. Placeholders for columns are told by their addresses,
    everything else is kept as it comes."""

    closed = False

    def __init__(self, columns: Mapping[int, Tensor]) -> None:
        self.columns, self.pieces, self.position = columns, list[bytes | Tensor](), 0

    def write(self, data: bytes | pa.Buffer) -> int:
        column = self.columns.get(data.address) if isinstance(data, pa.Buffer) else None
        if column is not None and len(data) == column.nbytes:
            self.pieces.append(column)
        elif self.pieces and isinstance(self.pieces[-1], bytes):
            self.pieces[-1] += bytes(data)
        else:
            self.pieces.append(bytes(data))
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def encode(
    columns: Mapping[str, Tensor],
    facts: Mapping[str, str] | None = None,
    chunks: Chunks = host_chunks,
) -> ArrowFile:
    """Columns of equal length -> one Arrow IPC file with one record batch.

    Args:
        columns: on any device that `chunks` can read; kept, not copied.
        facts: what the file is, as text.
    """
    fields, arrays, places = [], [], dict[int, Tensor]()
    for name, tensor in columns.items():
        plain = tensor.detach().contiguous()
        values = pa.Array.from_buffers(
            ARROW_TYPES[BITS.get(plain.dtype, plain.dtype)],
            plain.numel(),
            [None, placeholder(plain, places)],
            null_count=0,
        )
        array = (
            values if plain.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, plain.shape[1])
        )
        arrays.append(array)
        metadata = {TORCH_DTYPE: str(plain.dtype).removeprefix("torch.")}
        fields.append(pa.field(name, array.type, nullable=False, metadata=metadata))
    schema = pa.schema(fields, metadata=dict(facts) if facts else None)
    sink = Sink(places)
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    kept = sum(isinstance(piece, Tensor) for piece in sink.pieces)
    assert kept == len(places), "pyarrow copied a column instead of handing it on"
    return ArrowFile(sink.pieces, chunks)


def placeholder(tensor: Tensor, places: dict[int, Tensor]) -> pa.Buffer:
    """Address space as large as the tensor, which nobody touches and which so takes no memory;
    `places` notes whose it is."""
    if not tensor.nbytes:
        return pa.py_buffer(b"")
    buffer = pa.py_buffer(mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    places[buffer.address] = tensor
    return buffer


def decode(
    data: bytes | memoryview, where: str, facts: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Inverse of `encode`; the tensors are read-only views of `data`.

    Only bytes that were held against a digest may come here: a flipped bit in a file's offsets can
    take the process along.

    Args:
        facts: what the file must say that it is.
    Raises: ShardCorruptError naming the object when it is not what `encode` writes, or says that it
        is something else.
    """
    try:
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            batch = reader.get_batch(0)
            said = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardCorruptError(f"{where}: not an Arrow IPC file: {error}") from None
    for name, expected in (facts or {}).items():
        if said.get(name) != expected:
            raise ShardCorruptError(
                f"{where}: {name}: expected {expected!r}, found {said.get(name)!r}"
            )
    return {
        field.name: column_tensor(field, column)
        for field, column in zip(batch.schema, batch.columns, strict=True)
    }


def column_tensor(field: pa.Field, column: pa.Array) -> Tensor:
    width = field.type.list_size if pa.types.is_fixed_size_list(field.type) else None
    values = column.flatten() if width else column
    with warnings.catch_warnings():
        # torch warns that the view is read-only; that is what we promise
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(values.to_numpy(zero_copy_only=True))
    dtype = getattr(torch, (field.metadata or {}).get(TORCH_DTYPE, b"").decode(), tensor.dtype)
    tensor = tensor.view(dtype) if dtype in BITS else tensor
    return tensor.reshape(-1, width) if width else tensor
