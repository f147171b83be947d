"""Rows of values, one a token, in the form in which parts store them: bf16, float32, or int8 codes
with their scales (block_int8).

Rows are picked as they are stored, and decoded when they are used, so that what is held never grows
beyond what was written.

Legend: T tokens, H values of a token, G blocks of a row (H/16).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p48ray.numerics import block_int8


@dataclass(frozen=True, slots=True)
class TokenRows:
    """(T, H) values: floats themselves, or int8 codes with scales (T, H/16)."""

    values_TH: Tensor
    scale_TG: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values_TH)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "TokenRows":
        """The same rows with a function's results in place of their tensors."""
        return TokenRows(
            function(self.values_TH), None if self.scale_TG is None else function(self.scale_TG)
        )

    def pick(self, rows: Tensor | slice) -> "TokenRows":
        return self.mapped(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "TokenRows":
        return self.mapped(lambda tensor: tensor.to(device))

    def decoded(self, device: torch.device) -> Tensor:
        """(T, H) float32 on the device; the stored form is what travels there."""
        there = self.to(device)
        return (
            there.values_TH.float()
            if there.scale_TG is None
            else block_int8.decode(there.values_TH, there.scale_TG)
        )


def joined(rows: Sequence[TokenRows]) -> TokenRows:
    """All rows one below the other; they are stored alike."""
    scales = [r.scale_TG for r in rows if r.scale_TG is not None]
    return TokenRows(torch.cat([r.values_TH for r in rows]), torch.cat(scales) if scales else None)
