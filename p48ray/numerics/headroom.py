"""How much room above the calibration's maximum an activation's global scale leaves, and which
groups lose by it.

    global = 448 * 6 / (headroom * amax)          scale of a group = e4m3(global * amax_group / 6)

What exceeds headroom * amax saturates: later text, other languages, images. A group's scale is a
float, so a power of two more room costs nothing, until small groups' scales leave E4M3's normal
numbers: below 2^-6 they lose a bit with each halving, below 2^-10 they are zero and so is the
group. A group is normal while headroom * amax / amax_group is at most 448 * 2^6 = 28,672 (a
sixteenth more by rounding). So the room is as large as a layer's own groups allow.

Groups are counted by their amax in bins of a quarter of an octave, which is what the parts of a
layer can add up; a bin is taken for its lower edge, so that the room found is never too large.

An expert whose intermediates are far louder than its layer's drowns the others' groups. Up's rows
times 2^-k and down's columns times 2^k are the same function, exactly, so such an expert is brought
down to its layer where that lets the others out of the subnormals.

Legend: G groups.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from p48ray.numerics.activation import input_global_scale
from p48ray.numerics.e2m1 import E2M1_MAX
from p48ray.numerics.nvfp4 import E4M3_MAX, round_to_e4m3

MOST_HEADROOM = 16.0
SUBNORMAL_SHARE = 0.001
"""Of the non-zero calibration groups, at most, where the room is chosen."""

SMALLEST_NORMAL = 2.0**-6  # of E4M3
FLOAT32_MAX = torch.finfo(torch.float32).max
LOUD_SHARE = 1 / 16
"""Of a layer's experts that saw tokens: no more are loud. Their own groups, which move down with
them, are then too few to matter."""
MOST_SHIFT = 8  # gate and up share a global scale, under which up's blocks become smaller

MANTISSA_BITS_DROPPED = 21  # of float32's 23: two are kept, four bins an octave
NUM_BINS = 2 ** (31 - MANTISSA_BITS_DROPPED)
SATURATION_TOLERANCE = 1e-6  # as activation.CLIP_TOLERANCE: the amax itself is within


class ScaleMasks(NamedTuple):
    """What becomes of groups. A saturated one has values beyond the format's largest; a subnormal
    one's scale has lost bits; a zero one is lost whole. None of an all-zero group."""

    saturated: Bool[Tensor, " g"]
    subnormal: Bool[Tensor, " g"]
    zero: Bool[Tensor, " g"]


def group_amax(x: Float[Tensor, "t i"], group: int) -> Float[Tensor, " g"]:
    """Largest |x| of every group of `group` neighbouring inputs; one pass, on x's device."""
    return torch.linalg.vector_norm(x.unflatten(1, (-1, group)), math.inf, dim=-1).flatten()


def count_bins(amax_G: Float[Tensor, " g"]) -> Int64[Tensor, " bins"]:
    """How many groups each of NUM_BINS bins has; all-zero groups are in bin 0."""
    bits_G = amax_G.float().view(torch.int32) >> MANTISSA_BITS_DROPPED
    return torch.bincount(bits_G, minlength=NUM_BINS)


def lower_edges(bins: list[int]) -> Float[Tensor, " bins"]:
    """The smallest amax of each bin, float32."""
    return (torch.tensor(bins, dtype=torch.int32) << MANTISSA_BITS_DROPPED).view(torch.float32)


def classify(amax_G: Float[Tensor, " g"], global_scale: float) -> ScaleMasks:
    """What becomes of groups under an input global scale (a divisor, 448 * 6 / (headroom * amax)).
    `amax_G`: float32."""
    scale = torch.full((), global_scale, dtype=torch.float32, device=amax_G.device)
    raw_G = scale * (amax_G / torch.full_like(scale, E2M1_MAX))
    rounded_G = round_to_e4m3(raw_G)
    return ScaleMasks(
        saturated=raw_G > E4M3_MAX * (1 + SATURATION_TOLERANCE),
        subnormal=(rounded_G > 0) & (rounded_G < SMALLEST_NORMAL),
        zero=(rounded_G == 0) & (amax_G > 0),
    )


def largest_headroom(counts: Mapping[int, int], amax: float) -> float:
    """The largest power of two up to MOST_HEADROOM under which at most SUBNORMAL_SHARE of the
    non-zero groups have a scale that is subnormal or zero; 1 where there is none.

    Args:
        counts: groups by bin, of the layer.
        amax: the layer's largest value.
    """
    headroom = MOST_HEADROOM
    while headroom > 1 and (
        headroom * amax > FLOAT32_MAX
        or lost_share(counts, input_global_scale(headroom * amax)) > SUBNORMAL_SHARE
    ):
        headroom /= 2
    return headroom


def lost_share(counts: Mapping[int, int], global_scale: float) -> float:
    """Of the non-zero groups, those whose scale is subnormal or zero. counts: groups by bin."""
    bins = sorted(b for b in counts if b > 0)
    weights = torch.tensor([counts[b] for b in bins], dtype=torch.int64)
    found = classify(lower_edges(bins), global_scale)
    return weights[found.subnormal | found.zero].sum().item() / max(1, weights.sum().item())


def loud_experts(amax_by_expert: Sequence[float], counts: Mapping[int, int]) -> dict[int, int]:
    """Expert -> k > 0, of those to bring down by 2^k; none where no group of the layer's is lost to
    them, or where bringing down a few does not help.

    The smallest step down of the loudest experts' level, by powers of two, under which at most
    SUBNORMAL_SHARE of the layer's groups are lost without any headroom.
    Args:
        amax_by_expert: of the layer's intermediates, in the experts' order.
        counts: the layer's groups by bin, before any shift.
    """
    loudest = max(amax_by_expert, default=0.0)
    seen = sum(amax > 0 for amax in amax_by_expert)
    if not seen or lost_share(counts, input_global_scale(loudest)) <= SUBNORMAL_SHARE:
        return {}
    for step in range(1, MOST_SHIFT + 1):
        level = loudest / 2**step
        shifts = {
            expert: math.ceil(math.log2(amax / level))
            for expert, amax in enumerate(amax_by_expert)
            if amax > level
        }
        if len(shifts) > LOUD_SHARE * seen:
            return {}
        after = max(amax / 2 ** shifts.get(expert, 0) for expert, amax in enumerate(amax_by_expert))
        if lost_share(counts, input_global_scale(after)) <= SUBNORMAL_SHARE:
            return shifts
    return {}
