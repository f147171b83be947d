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

Legend: G groups.
"""

import math
from collections.abc import Mapping
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
    bins = sorted(b for b in counts if b > 0)
    whole, edges = sum(counts[b] for b in bins), lower_edges(bins)
    weights = torch.tensor([counts[b] for b in bins], dtype=torch.int64)
    headroom = MOST_HEADROOM
    while headroom > 1:
        if headroom * amax <= FLOAT32_MAX:
            found = classify(edges, input_global_scale(headroom * amax))
            if weights[found.subnormal | found.zero].sum().item() <= SUBNORMAL_SHARE * whole:
                return headroom
        headroom /= 2
    return 1.0
