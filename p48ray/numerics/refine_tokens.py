"""The tokens of several experts as batches for refinement: drawn without replacement, every eighth
held out.

Legend: N experts, T tokens, H hidden size, G blocks of a stored row (H/16).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.numerics.token_rows import TokenRows, joined

BATCH_TOKENS = 256
HELD_OUT_SHARE = 8  # every eighth token is held out
MAX_HELD_OUT_TOKENS = 1024
MIN_TOKENS = 512  # below it nothing is learned that the held-out tokens could confirm


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTokens:
    """What one expert is refined on: inputs (T, H) as stored, token weights (T,)."""

    rows: TokenRows
    weight_T: Tensor


class Batch(NamedTuple):
    """The same number of tokens of every expert: inputs (N, T, H) float32, weights (N, T)."""

    x_NTH: Tensor
    weight_NT: Tensor


class TokenTable:
    """All experts' tokens one below the other, as stored, and a last row of zeros and weight 0 for
    an expert that has too few.

    Every eighth token of an expert is held out, at most MAX_HELD_OUT_TOKENS of them; it learns from
    the others.
    """

    def __init__(self, tokens: Sequence[ExpertTokens]) -> None:
        none = tokens[0].rows.pick(slice(0))
        zero = TokenRows(
            none.values_TH.new_zeros(1, none.values_TH.shape[1]),
            None if none.scale_TG is None else none.scale_TG.new_ones(1, none.scale_TG.shape[1]),
        )
        self.rows = joined([*(t.rows for t in tokens), zero])
        self.device = self.rows.values_TH.device
        self.weight_T = torch.cat(
            [*(t.weight_T for t in tokens), torch.zeros(1, device=self.device)]
        )
        self.train, self.held = [], []
        first, last = 0, len(self.rows) - 1
        for t in tokens:
            index = torch.arange(first, first + len(t.rows))
            first += len(t.rows)
            is_held = (index - index[:1]) % HELD_OUT_SHARE == 0
            enough = len(index) >= HELD_OUT_SHARE
            self.train.append(index[~is_held] if enough else torch.tensor([last]))
            self.held.append(
                index[is_held][:MAX_HELD_OUT_TOKENS] if enough else torch.tensor([last])
            )

    def draw(self, steps: int) -> Tensor:
        """Rows of every step and expert to learn from, (S, N, BATCH_TOKENS); the same every
        time."""
        generator = torch.Generator().manual_seed(0)
        drawn = [
            [t[torch.randint(0, len(t), (BATCH_TOKENS,), generator=generator)] for t in self.train]
            for _ in range(steps)
        ]
        return (
            torch.stack([torch.stack(rows) for rows in drawn]).to(self.device)
            if steps
            else torch.empty(0)
        )

    def held_out(self) -> Batch:
        """Short experts are padded with the row of zeros."""
        longest = max(map(len, self.held))
        return self.batch(
            torch.stack(
                [F.pad(t, (0, longest - len(t)), value=len(self.rows) - 1) for t in self.held]
            ).to(self.device)
        )

    def batch(self, index_NT: Tensor) -> Batch:
        x_TH = self.rows.pick(index_NT.flatten()).decoded(self.device)
        return Batch(x_TH.view(*index_NT.shape, -1), self.weight_T[index_NT])
