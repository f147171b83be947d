"""NVFP4 weights: E2M1 codes, one E4M3 scale per scale_group of 16 inputs, one float32 global scale
per linear.

    w = e2m1(code) * (e4m3(scale) / global)
    global = 448 * 6 / amax: a DIVISOR, so that the largest scale_group's scale lands on E4M3's
             largest value

Sources: [NVFP4] NVIDIA, "Introducing NVFP4", 2025; compressed-tensors 0.20, format
`nvfp4-pack-quantized`: `quantize` and `dequantize` give its codes and values bit for bit (its
decoder then rounds to bf16). Every quotient is a division of two tensors on purpose: torch turns a
division by a Python number into a product with the reciprocal on CUDA, and `number / tensor`
everywhere, which differs in the last bit.

Deliberate departures: no code 8 (see e2m1); a scale is never below E4M3's smallest subnormal
(compressed-tensors puts 0.125 for a scale that rounds to 0).

Legend: N experts, O out, I in, G scale groups (I/16), S spans (I/16 or I/32), V values of a span, C
candidates.
"""

import torch
from jaxtyping import Float8e4m3fn, Float32, UInt8
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1
from p48ray.numerics.e2m1 import E2M1_MAX, round_to_e2m1

E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
SCALE_GROUP = 16
SCALE_SPANS = (16, 32)
# Multiples of amax / 6 that the search tries. The first wins ties. Above 1 the top of the E2M1
# range stays unused, below 1 the largest values are clipped.
SCALE_FACTORS = (1.0, 1.5, 1.25, 1.12, 0.93, 0.87, 0.8, 0.73, 0.67, 0.6, 0.5)
# Keeps every scale / global a normal float32: 2^-9 / 2^117 = 2^-126. Reached only by linears whose
# largest weight is below 1.6e-32.
MAX_GLOBAL_SCALE = 2.0**117
_SEARCH_ELEMENTS = 2**25  # candidates * values held at once in `choose_scales`: 128 MiB a temporary


def global_scale_from_amax(amax: Float32[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
    """448 * 6 / amax, the divisor; 1 where amax is 0. Finite and positive for every finite amax >=
    0."""
    scale = (torch.full_like(amax, E4M3_MAX * E2M1_MAX) / amax).clamp_max(MAX_GLOBAL_SCALE)
    return torch.where(amax == 0, torch.ones_like(amax), scale)


def round_to_e4m3(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The nearest E4M3 value, ties to even, saturating at +-448 (torch's own cast makes NaN of
    larger values in some versions)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def effective_scale(
    scale: Float8e4m3fn[Tensor, "n *g"], global_scale: Float32[Tensor, "n"]
) -> Float32[Tensor, "n *g"]:
    """scale / global: what one E2M1 unit of a scale_group is worth."""
    return scale.float() / global_scale.reshape(-1, *[1] * (scale.dim() - 1))


def choose_scales(
    values: Float32[Tensor, "n o i"], global_scale: Float32[Tensor, "n"], span: int, search: bool
) -> Float8e4m3fn[Tensor, "n o i//16"]:
    """One E4M3 scale per `span` consecutive inputs, stored once per scale_group of 16.

    Args:
        values: (N, O, I), weights with pruned ones as zeros (a zero has no error under any scale).
        global_scale: (N,), the divisor.
        span: 16, or 32 for the sparse kernels, whose MMA applies one scale to 32 inputs: the byte
            is then stored twice.
        search: take the SCALE_FACTORS multiple of amax / 6 with the least squared error of the
            span; otherwise amax / 6 itself.
    Returns: scales in [2^-9, 448]; a span of zeros has 2^-9.
    Raises: NumericsError if span is neither 16 nor 32 or does not divide i.
    """
    n, o, i = values.shape
    if span not in SCALE_SPANS or i % span:
        raise NumericsError(
            f"choose_scales: expected a span of 16 or 32 that divides the {i} inputs, found {span}"
        )
    factors = SCALE_FACTORS if search else SCALE_FACTORS[:1]
    spans_NOSV = values.unflatten(2, (-1, span))
    slab = max(1, _SEARCH_ELEMENTS // (n * o * span * len(factors)))
    scale_NOS = torch.cat(
        [_best_scale(part, global_scale, factors) for part in spans_NOSV.split(slab, dim=2)], dim=2
    )
    return scale_NOS.to(torch.float8_e4m3fn).repeat_interleave(span // SCALE_GROUP, dim=2)


def _best_scale(values_NOSV: Tensor, global_scale_N: Tensor, factors: tuple[float, ...]) -> Tensor:
    """E4M3 values (N, O, S) of the candidate with the least squared error, the first of equals."""
    global_N11 = global_scale_N[:, None, None]
    base_NOS = values_NOSV.abs().amax(-1) / torch.full_like(global_N11, E2M1_MAX) * global_N11
    candidates = [
        round_to_e4m3((base_NOS * f).clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX)) for f in factors
    ]
    if len(candidates) == 1:
        return candidates[0]
    scale_CNOS = torch.stack(candidates)
    unit_CNOS1 = (scale_CNOS / global_N11)[..., None]
    error_CNOS = (
        (round_to_e2m1(values_NOSV / unit_CNOS1).mul_(unit_CNOS1).sub_(values_NOSV))
        .square_()
        .sum(-1)
    )
    # argmin: the first of equal minima
    return scale_CNOS.gather(0, error_CNOS.argmin(0, keepdim=True))[0]


def quantize(
    values: Float32[Tensor, "n o i"],
    scale: Float8e4m3fn[Tensor, "n o i//16"],
    global_scale: Float32[Tensor, "n"],
) -> UInt8[Tensor, "n o i"]:
    """E2M1 codes of values / (scale / global)."""
    unit_NOG1 = effective_scale(scale, global_scale)[..., None]
    return e2m1.encode((values.unflatten(2, (-1, SCALE_GROUP)) / unit_NOG1).flatten(2))


def dequantize(
    codes: UInt8[Tensor, "n o i"],
    scale: Float8e4m3fn[Tensor, "n o i//16"],
    global_scale: Float32[Tensor, "n"],
) -> Float32[Tensor, "n o i"]:
    """e2m1(code) * (scale / global), in float32."""
    unit_NOG1 = effective_scale(scale, global_scale)[..., None]
    return (e2m1.decode(codes).unflatten(2, (-1, SCALE_GROUP)) * unit_NOG1).flatten(2)


def dequantize_packed(
    packed: UInt8[Tensor, "n o b"],
    scale: Float8e4m3fn[Tensor, "n o b//8"],
    global_scale: Float32[Tensor, "n"],
) -> Float32[Tensor, "n o i"]:
    """`dequantize` of e2m1.unpack(packed), two codes at a time: the same values."""
    unit_NOG1 = effective_scale(scale, global_scale)[..., None]
    return (e2m1.decode_packed(packed).unflatten(2, (-1, SCALE_GROUP)) * unit_NOG1).flatten(2)
