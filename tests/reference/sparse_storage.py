"""An independent reader of sparse storage, one byte at a time, from the description of the format
alone (DESIGN 2.4), sharing no code with p48ray."""

import json
import struct
from collections.abc import Mapping


def read_file(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: (r["dtype"], r["shape"], body[r["data_offsets"][0] : r["data_offsets"][1]])
        for name, r in header.items()
    }


def dense_bytes(kept: bytes, mask: bytes) -> bytes:
    """Of every 4 bytes the 2 kept ones, put where 4 bits of the mask say; two chunks a byte of
    mask, the first in its low nibble."""
    result = bytearray()
    queue = iter(kept)
    for byte in mask:
        for nibble in (byte % 16, byte // 16):
            result += bytes(next(queue) if nibble & (1 << i) else 0 for i in range(4))
    assert next(queue, None) is None
    return bytes(result)


def dense_scales(scales: bytes) -> bytes:
    """One byte per 32 inputs as one per 16."""
    return bytes(byte for byte in scales for _ in range(2))


def dense_checkpoint(files: Mapping[str, bytes]) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of a sparse checkpoint's safetensors files, in their dense form."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for file, data in files.items():
        if not file.endswith(".safetensors"):
            continue
        tensors = read_file(data)
        for name, (dtype, shape, raw) in tensors.items():
            stem, _, suffix = name.rpartition(".")
            is_sparse = f"{stem}.weight_sparse_mask" in tensors
            if suffix == "weight_sparse_packed":
                _, mask_shape, mask = tensors[f"{stem}.weight_sparse_mask"]
                assert mask_shape == [shape[0], shape[1] // 4]
                found[f"{stem}.weight_packed"] = (
                    "U8",
                    [shape[0], shape[1] * 2],
                    dense_bytes(raw, mask),
                )
            elif suffix == "weight_scale" and is_sparse:
                found[name] = (dtype, [shape[0], shape[1] * 2], dense_scales(raw))
            elif suffix != "weight_sparse_mask":
                found[name] = (dtype, shape, raw)
    return found
