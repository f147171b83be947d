"""What becomes of the groups of values that share an E4M3 scale, as manifests count it.

Legend: G groups.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from p48ray.numerics.headroom import ScaleMasks, classify, lower_edges
from p48ray.run.records import Record


class GroupHistogram(Record):
    """Groups of values by their amax, in bins of a quarter of an octave (numerics.headroom)."""

    first: int = Field(description="The bin of the first count; bin 0 has the all-zero groups.")
    counts: tuple[int, ...]

    @model_validator(mode="before")
    @classmethod
    def without_empty_ends(cls, values: object) -> object:
        """Counts of all bins, from the first on, are taken too."""
        if not isinstance(values, list):
            return values
        filled = [i for i, count in enumerate(values) if count]
        first, last = (filled[0], filled[-1]) if filled else (0, -1)
        return {"first": first, "counts": tuple(values[first : last + 1])}

    def by_bin(self) -> dict[int, int]:
        return {self.first + i: count for i, count in enumerate(self.counts) if count}


class ScaleCounts(Record):
    """Groups of values that share an E4M3 scale, and how many of them lose by it. All-zero groups
    are not counted."""

    groups: int = 0
    saturated: int = Field(0, description="With values above the largest that the format holds.")
    subnormal: int = Field(0, description="Whose scale is below 2^-6 and has lost bits.")
    zero: int = Field(0, description="Whose scale is zero, so that all their values are.")

    def __add__(self, other: "ScaleCounts") -> "ScaleCounts":
        names = ScaleCounts.model_fields
        return ScaleCounts(**{n: getattr(self, n) + getattr(other, n) for n in names})


class LayerScaleCounts(Record):
    """What becomes of one layer's activations on held-out text, as the compressed model has
    them."""

    layer: int
    gate_up: ScaleCounts
    down: ScaleCounts


def summed_by_layer(counts: Iterable[LayerScaleCounts]) -> tuple[LayerScaleCounts, ...]:
    """Those of each layer added up, in the order in which layers come first."""
    sums: dict[int, LayerScaleCounts] = {}
    for c in counts:
        before = sums.get(c.layer)
        sums[c.layer] = (
            c
            if before is None
            else LayerScaleCounts(
                layer=c.layer, gate_up=before.gate_up + c.gate_up, down=before.down + c.down
            )
        )
    return tuple(sums.values())


def merged_bins(histograms: Iterable[GroupHistogram]) -> dict[int, int]:
    """Counts by bin of all of them together."""
    bins: Counter[int] = Counter()
    for histogram in histograms:
        bins.update(histogram.by_bin())
    return dict(sorted(bins.items()))


def count_binned(bins: dict[int, int], global_scale: float) -> ScaleCounts:
    """What becomes of groups in bins under an input global scale, each taken for the lower edge of
    its bin."""
    filled = [b for b in bins if b > 0]
    weights = torch.tensor([bins[b] for b in filled], dtype=torch.int64)
    return counted(classify(lower_edges(filled), global_scale), weights)


def count_groups(amax_G: Tensor, global_scale: float) -> ScaleCounts:
    """The same of groups whose amax is known."""
    amax_G = amax_G.float()
    return counted(classify(amax_G, global_scale), (amax_G > 0).long())


def counted(masks: ScaleMasks, weights_G: Tensor) -> ScaleCounts:
    """Sums of weights, by what becomes of their groups."""
    sums = [weights_G[mask].sum() for mask in masks]
    groups, *others = torch.stack([weights_G.sum(), *sums]).tolist()
    return ScaleCounts(groups=groups, **dict(zip(ScaleMasks._fields, others, strict=True)))
