"""Held-out tokens by where they stand, and their figures summed so.

A cell has the tokens of one source of the mix in one stretch of positions. Sums over anything more
are sums of cells.

Legend: B held-out sequences of a part, S positions, T tokens whose logits exist at once, V
vocabulary, R figures of a token: the source's loss and whether its first choice is right, then
loss, whether right, and KL from the source for every view of the compressed model.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.run.manifest import CompressedSums, EvaluationCell
from p48ray.run.plan import SequencePart

FIRST_EDGE, EDGE_RATIO = 512, 4
SUMS = ("the source's loss", "", "the compressed model's loss", "", "KL")
GROUPS_OF_32 = ("its loss with activations in groups of 32", "", "its KL with these")


def stretch_ends(length: int) -> tuple[int, ...]:
    """After which positions the stretches of a sequence end: 512, 2,048, 8,192, ... and its length,
    so that stretches of runs with different lengths are the same; of a sequence of at most 512,
    an eighth and a half of it, and its length. There are always two or more.

    Args: length: tokens of the sequence, at least 2.
    """
    ends, end = list[int](), FIRST_EDGE
    while end < length:
        ends.append(end)
        end *= EDGE_RATIO
    short = [share for share in (length // 8, length // 2) if share]
    return (*(ends or short), length)


def stretch_words(first: int, last: int) -> str:
    """Positions of a stretch for people. The first one is 1: a token that is predicted at position
    n has n tokens before it."""
    return f"{first:,} to {last:,}"


def cells_of(documents_B: Sequence[int], length: int) -> Tensor:
    """(B, S) int64: the cell of every token, sources first.

    Args:
        documents_B: of every sequence, the place of its source in evaluation.documents.
        length: S.
    """
    ends = torch.tensor(stretch_ends(length))
    stretch_S = torch.bucketize(torch.arange(length), ends, right=True)
    return torch.tensor(documents_B)[:, None] * len(ends) + stretch_S


def compare_logits(source_TV: Tensor, *compressed_TV: Tensor, labels_T: Tensor) -> Tensor:
    """(R, T) float64: the figures of every token."""
    p_TV = F.log_softmax(source_TV.float(), -1)
    figures = [F.nll_loss(p_TV, labels_T, reduction="none"), p_TV.argmax(-1) == labels_T]
    for logits_TV in compressed_TV:
        q_TV = F.log_softmax(logits_TV.float(), -1)
        figures += [F.nll_loss(q_TV, labels_T, reduction="none"), q_TV.argmax(-1) == labels_T]
        figures.append(F.kl_div(q_TV, p_TV, reduction="none", log_target=True).sum(-1))
    return torch.stack([value.double() for value in figures])


class CellSums:
    """Sums of figures by cell, float64, on the CPU in a fixed order: the same tokens give the same
    bytes."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, figures_RT: Tensor, cells_T: Tensor) -> None:
        """Of some more tokens. Args: cells_T: int64, on the CPU."""
        figures_RT = figures_RT.cpu()
        for cell in cells_T.unique().tolist():
            is_own_T = cells_T == cell
            own = figures_RT[:, is_own_T].sum(1)
            self.sums[cell] = self.sums[cell] + own if cell in self.sums else own
            self.counts[cell] = self.counts.get(cell, 0) + int(is_own_T.sum())

    def records(self, part: SequencePart, length: int) -> tuple[EvaluationCell, ...]:
        """In order of sources and stretches.

        Args:
            part: that the sums are of.
            length: tokens of a sequence.
        Raises: NumericsError for a sum that is not finite, before anything is written of the part.
        """
        num_stretches, found = len(stretch_ends(length)), []
        for cell in sorted(self.sums):
            document, stretch = divmod(cell, num_stretches)
            sums = self.sums[cell].tolist()
            check_sums(part, document, sums)
            source_loss, source_correct, loss, correct, kl, *other = sums
            found.append(
                EvaluationCell(
                    document=document,
                    stretch=stretch,
                    num_tokens=self.counts[cell],
                    source_loss=source_loss,
                    source_correct=int(source_correct),
                    compressed_loss=loss,
                    compressed_correct=int(correct),
                    kl=kl,
                    in_groups_of_32=(
                        CompressedSums(loss=other[0], correct=int(other[1]), kl=other[2])
                        if other
                        else None
                    ),
                )
            )
        return tuple(found)


def check_sums(part: SequencePart, document: int, sums: Sequence[float]) -> None:
    """The sums of one cell.

    Raises: NumericsError, naming part, source and figure, for one that is not finite.
    """
    for name, value in zip((*SUMS, *GROUPS_OF_32), sums, strict=False):
        if math.isfinite(value):
            continue
        last = part.first_sequence + part.num_sequences - 1
        advice = "calibration.compute_dtype may be too narrow for this model (float32 is not)"
        raise NumericsError(
            f"evaluation, part {part.part} (held-out sequences {part.first_sequence} to {last}):"
            f" {name}: expected a finite sum, found {value}; nothing was written of it. Weights of"
            f" the source are finite by now, so {advice}; or evaluation.documents[{document}] has a"
            " text that the model itself has no number for"
        )
