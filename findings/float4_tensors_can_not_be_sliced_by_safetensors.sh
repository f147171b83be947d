#!/usr/bin/env bash
# Guess: a tensor of torch's packed 4-bit floats (float4_e2m1fn_x2, two values a byte) that safetensors has written can be read
# in slices, as tensors of every other dtype can: that is how servers with tensor parallelism read their share of a weight.
# Seen (2026-11-30, safetensors 0.8.0, torch 2.13.0, Linux, CPU): the header says F4 and counts values (4 x 16 for torch's 4 x 8
# bytes), and the whole tensor comes back bit for bit. Every slice of rows, columns or all of it is a RuntimeError, "shape '[4, 16]'
# is invalid for input of size 32": the slice is viewed with the header's shape, which counts two values for each element of
# torch's. The same bytes as uint8 are sliced without fault. Whoever stores 4-bit floats for others to load stores uint8, as
# compressed-tensors does.
# Output: "whole: equal", "slices of F4: 0 of 4 read", "slices of uint8: 4 of 4 read". Exit code 0 while that is so, else 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 packaging
WORK="$work" "$work/venv/bin/python" - <<'PYTHON'
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = os.path.join(os.environ["WORK"], "packed.safetensors")
as_bytes = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
save_file({"f4": as_bytes.view(torch.float4_e2m1fn_x2), "u8": as_bytes.clone()}, path)
asked = {"all rows": (slice(None),), "two rows": (slice(0, 2),), "a row": (1,), "columns": (slice(None), slice(0, 4))}


def sliced(name: str) -> int:
    """How many of the slices are read."""
    count = 0
    for what, index in asked.items():
        with safe_open(path, "pt") as opened:
            part = opened.get_slice(name)
            try:
                part[index if len(index) > 1 else index[0]]
                count += 1
            except RuntimeError as error:
                print(f"{name}, {what}: RuntimeError: {error}")
    return count


with safe_open(path, "pt") as opened:
    header = (opened.get_slice("f4").get_dtype(), opened.get_slice("f4").get_shape())
    whole = torch.equal(opened.get_tensor("f4").view(torch.uint8), as_bytes)
found = sliced("f4"), sliced("u8")
print(f"header: {header}")
print("whole:", "equal" if whole else "differs")
print(f"slices of F4: {found[0]} of 4 read")
print(f"slices of uint8: {found[1]} of 4 read")
sys.exit(0 if (header, whole, found) == (("F4", [4, 16]), True, (0, 4)) else 1)
PYTHON
