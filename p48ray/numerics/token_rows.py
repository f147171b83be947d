"""Rows of values, one a token, in the form in which parts store them: bf16, float32, or int8 codes with their scales (block_int8).

Rows are picked as they are stored, and decoded when they are used, so that what is held never grows beyond what was written.

Legend: T tokens, H values of a token, G blocks of a row (H/16).
"""

from collections.abc import Sequence
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

    @property
    def nbytes(self) -> int:
        return self.values_TH.nbytes + (0 if self.scale_TG is None else self.scale_TG.nbytes)

    def pick(self, rows: Tensor | slice) -> "TokenRows":
        return TokenRows(self.values_TH[rows], None if self.scale_TG is None else self.scale_TG[rows])

    def to(self, device: torch.device) -> "TokenRows":
        return TokenRows(self.values_TH.to(device), None if self.scale_TG is None else self.scale_TG.to(device))

    def decoded(self, device: torch.device) -> Tensor:
        """(T, H) float32 on the device; the stored form is what travels there."""
        there = self.to(device)
        return there.values_TH.float() if there.scale_TG is None else block_int8.decode(there.values_TH, there.scale_TG)


def joined(rows: Sequence[TokenRows]) -> TokenRows:
    """All rows one below the other; they are stored alike."""
    scales = [r.scale_TG for r in rows if r.scale_TG is not None]
    return TokenRows(torch.cat([r.values_TH for r in rows]), torch.cat(scales) if scales else None)
