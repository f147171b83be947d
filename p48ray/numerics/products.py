"""Which matrix products may round their operands to TF32 on a GPU.

A product in TF32 runs eight times as fast as in float32 there and rounds each operand to 11 bits,
to nearest on average: a relative error of 2^-12 or so a term, independent between terms. Where a
result is a sum of many such terms that nothing cancels below 1e-3 of them (error feedback, slopes
of a descent, sums of losses), that is far below what a solver does to the weights;
docs/PERFORMANCE.md has the measured output errors with and without.

In an expert's own forward and its gradients one operand is a weight of 4 bits times a bf16 scale,
which TF32 holds exactly; only the tokens are rounded.

Elsewhere products stay in float32: the runner switches TF32 off, and this switches it on for a
block of code.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float_32(is_allowed: bool = True) -> Iterator[None]:
    """Products of float32 matrices on a GPU may use TF32 inside; on a CPU nothing changes."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
