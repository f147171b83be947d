"""Tensors of one row per token as Arrow IPC: readable by anything that speaks Arrow, and back into torch without a copy.

Every file carries a digest of its values and is checked against it when read: boundaries have no manifest that could tell a flipped bit.

A 2-D tensor becomes a FixedSizeList column, a 1-D tensor a plain one. bf16 has no Arrow type, so its bits travel as uint16; the field's metadata says so.
"""

import hashlib
import warnings

import pyarrow as pa
import torch
from torch import Tensor

from p48ray.errors import ShardCorruptError
from p48ray.store.base import Store

BITS = {torch.bfloat16: torch.uint16}
TORCH_DTYPE = b"torch_dtype"
DIGEST = b"sha256"


def encode(columns: dict[str, Tensor]) -> bytes:
    """Columns of equal length -> one Arrow IPC file with one record batch."""
    fields, arrays = [], []
    for name, tensor in columns.items():
        plain = tensor.detach().cpu().contiguous()
        values = pa.array(plain.view(BITS.get(plain.dtype, plain.dtype)).reshape(-1).numpy())
        array = values if plain.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, plain.shape[1])
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={TORCH_DTYPE: str(plain.dtype).removeprefix("torch.")}))
    schema = pa.schema(fields, metadata={DIGEST: digest(arrays)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def digest(columns: list[pa.Array]) -> bytes:
    """SHA-256 over the columns' values, as hexadecimal text."""
    sums = hashlib.sha256()
    for column in columns:
        values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        sums.update(values.to_numpy(zero_copy_only=True))
    return sums.hexdigest().encode()


def store_once(store: Store, key: str, data: bytes) -> bytes:
    """Store an object that is never replaced. Returns the bytes that count: ours, or those of whoever was faster."""
    return data if store.put_if_absent(key, data) else store.get(key)


def claimed(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(DIGEST, b"(none)").decode(errors="replace")


def decode(data: bytes, where: str) -> dict[str, Tensor]:
    """Inverse of `encode`; the tensors are read-only views of `data`.

    Raises: ShardCorruptError naming the object when it is not what `encode` writes.
    """
    try:
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            batch = reader.get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardCorruptError(f"{where}: not an Arrow IPC file: {error}") from None
    if (batch.schema.metadata or {}).get(DIGEST) != digest(batch.columns):
        raise ShardCorruptError(f"{where}: the values are not those that were written: expected SHA-256 {claimed(batch.schema)}")
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
