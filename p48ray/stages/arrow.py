"""Tensors of one row per token as Arrow IPC: readable by anything that speaks Arrow, and back into torch without a copy.

Every file carries a digest of itself and is checked against it before it is parsed: boundaries have no manifest that could tell a flipped bit.

A 2-D tensor becomes a FixedSizeList column, a 1-D tensor a plain one. bf16 has no Arrow type, so its bits travel as uint16; the field's metadata says so.
"""

import hashlib
import re
import warnings

import pyarrow as pa
import torch
from torch import Tensor

from p48ray.errors import ShardCorruptError
from p48ray.store.base import Store

BITS = {torch.bfloat16: torch.uint16}
TORCH_DTYPE = b"torch_dtype"
SEAL = b"p48ray-sha256:"
UNSEALED = SEAL + b"0" * 64
SEALED = re.compile(SEAL + rb"([0-9a-f]{64})")


def encode(columns: dict[str, Tensor]) -> bytes:
    """Columns of equal length -> one Arrow IPC file with one record batch."""
    fields, arrays = [], []
    for name, tensor in columns.items():
        plain = tensor.detach().cpu().contiguous()
        values = pa.array(plain.view(BITS.get(plain.dtype, plain.dtype)).reshape(-1).numpy())
        array = values if plain.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, plain.shape[1])
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={TORCH_DTYPE: str(plain.dtype).removeprefix("torch.")}))
    schema = pa.schema(fields, metadata={b"seal": UNSEALED})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return seal(sink.getvalue().to_pybytes())


def seal(data: bytes) -> bytes:
    """Put the file's SHA-256, taken with zeros in its place, into the schema's metadata (which the format holds twice)."""
    return data.replace(UNSEALED, SEAL + hashlib.sha256(data).hexdigest().encode())


def is_sealed(data: bytes | memoryview) -> bool:
    """Whether the file is the one that was sealed. Before anything parses it: a flipped bit in its offsets can take the process along."""
    places = list(SEALED.finditer(data))
    if not places or len({place[1] for place in places}) != 1:
        return False
    digest, view, end = hashlib.sha256(), memoryview(data), 0
    for place in places:
        digest.update(view[end : place.start()])
        digest.update(UNSEALED)
        end = place.end()
    digest.update(view[end:])
    return digest.hexdigest().encode() == places[0][1]


def store_once(store: Store, key: str, data: bytes) -> bytes:
    """Store an object that is never replaced. Returns the bytes that count: ours, or those of whoever was faster."""
    return data if store.put_if_absent(key, data) else store.get(key)


def decode(data: bytes | memoryview, where: str, is_checked: bool = False) -> dict[str, Tensor]:
    """Inverse of `encode`; the tensors are read-only views of `data`.

    Args:   is_checked: the bytes are known to be those of a manifest's digest, so the seal is not looked at again.
    Raises: ShardCorruptError naming the object when it is not what `encode` writes.
    """
    if not is_checked and not is_sealed(data):
        raise ShardCorruptError(
            f"{where}: not an Arrow IPC file as it was written here: its SHA-256 is missing or is not that of its {len(data)} bytes"
        )
    try:
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            batch = reader.get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardCorruptError(f"{where}: not an Arrow IPC file: {error}") from None
    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        width = field.type.list_size if pa.types.is_fixed_size_list(field.type) else None
        values = column.flatten() if width else column
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the view is read-only; that is what we promise
            tensor = torch.from_numpy(values.to_numpy(zero_copy_only=True))
        dtype = getattr(torch, (field.metadata or {}).get(TORCH_DTYPE, b"").decode(), tensor.dtype)
        tensor = tensor.view(dtype) if dtype in BITS else tensor
        columns[field.name] = tensor.reshape(-1, width) if width else tensor
    return columns
