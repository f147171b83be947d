"""What is checked of one compressed linear: its four tensors by themselves, against its layer, and
against the source's weight.

Legend: O out, B packed bytes (two inputs each), G scale groups (16 inputs each).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p48ray.numerics import nvfp4, paired48
from p48ray.numerics.relative_errors import relative_weight_error
from p48ray.run.output_layout import TENSOR_SUFFIXES

# relative; the manifest's error was summed on the solver's device, this one here
CLAIM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a checkpoint's linears are held to. `weight_errors` and `input_scales` by module name,
    `unit_sha256` by unit id; what is in none of them claims nothing. `shifts`, by module name: of
    linears that are 2^e times the source's."""

    is_sparse: bool
    scale_span: int
    weight_errors: Mapping[str, float]
    unit_sha256: Mapping[str, str]
    input_scales: Mapping[str, float] = field(default_factory=dict)
    shifts: Mapping[str, int] = field(default_factory=dict)


def check_expert_tensors(
    experts: Iterable[tuple[Mapping[str, str], Mapping[str, Tensor] | None]],
    tensors: Mapping[str, Tensor],
    promise: Promise,
) -> list[str]:
    """Every check of a unit's experts, computed where the tensors are and brought to the CPU in one
    transfer.

    Args:
        experts: for each, projection -> module name, and projection -> the source's weight where
            that is to be compared; asked for one at a time.
    """
    named: list[tuple[Mapping[str, str], bool]] = []
    measured: list[Tensor] = []
    for names, originals in experts:
        named.append((names, originals is not None))
        for projection, name in names.items():
            linear = {suffix: tensors[f"{name}.{suffix}"] for suffix in TENSOR_SUFFIXES}
            original = None
            if originals is not None:
                original = originals[projection].float() * 2.0 ** promise.shifts.get(name, 0)
            measured.append(measure_linear(linear, original, promise))
    facts = iter(
        [LinearFacts(*values) for values in torch.stack(measured).tolist()] if measured else []
    )
    problems: list[str] = []
    for names, is_compared in named:
        problems += expert_problems(names, {p: next(facts) for p in names}, is_compared, promise)
    return problems


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """What the checks of one linear go by, as numbers of a device in float64, which holds each of
    them exactly. Flags are 0 or 1."""

    weight_global_scale: float
    input_global_scale: float
    are_scales_sound: float
    are_spans_equal: float
    has_minus_zero: float
    num_illegal: float
    weight_error: float


def measure_linear(
    linear: Mapping[str, Tensor], original: Tensor | None, promise: Promise
) -> Tensor:
    """LinearFacts as a tensor (7,) on the linear's device: nothing here waits for that. original:
    the source's weight, or None (error 0)."""
    scale_OG, packed_OB = linear["weight_scale"].float(), linear["weight_packed"]
    yes, none = torch.ones((), device=packed_OB.device), torch.zeros((), device=packed_OB.device)
    facts = [linear[suffix].reshape(()) for suffix in ("weight_global_scale", "input_global_scale")]
    facts.append((torch.isfinite(scale_OG) & (scale_OG > 0)).all())
    facts.append(
        (scale_OG[:, 0::2] == scale_OG[:, 1::2]).all() if promise.scale_span == 32 else yes
    )
    facts.append(((packed_OB & 0x0F) == 0x08).any() | ((packed_OB & 0xF0) == 0x80).any())
    facts.append(paired48.find_illegal(packed_OB).count_nonzero() if promise.is_sparse else none)
    if original is None:
        facts.append(none)
    else:
        values = nvfp4.dequantize_packed(
            packed_OB[None], linear["weight_scale"][None], linear["weight_global_scale"]
        )
        facts.append(relative_weight_error(original.float()[None], values).reshape(()))
    return torch.stack([fact.double() for fact in facts])


def expert_problems(
    names: Mapping[str, str], facts: Mapping[str, LinearFacts], is_compared: bool, promise: Promise
) -> Iterator[str]:
    """What is wrong with one expert, in words.

    Args:
        names, facts: module name and facts of each projection.
        is_compared: with the source, so that the weight error says something.
        promise: with the weight errors that are claimed.
    """
    for projection, name in names.items():
        found = [f"{name}.{text}" for text in linear_problems(facts[projection])]
        scale, claim = facts[projection].input_global_scale, promise.input_scales.get(name)
        if claim not in (None, scale):
            found.append(f"{name}.input_global_scale: expected its layer's {claim}, found {scale}")
        yield from found
        if not found and is_compared:
            yield from claim_problems(name, facts[projection].weight_error, promise)
    for suffix in ("weight_global_scale", "input_global_scale"):
        gate, up = (getattr(facts[projection], suffix) for projection in ("gate_proj", "up_proj"))
        if gate != up:
            yield f"{names['up_proj']}.{suffix}: expected gate's {gate}, found {up}"


def claim_problems(name: str, error: float, promise: Promise) -> Iterator[str]:
    """The plain weight error is what the manifest says."""
    claim = promise.weight_errors.get(name)
    if claim is None:
        yield f"{name}: relative weight error {error:.6g}, and no manifest that claims one"
    elif not math.isclose(error, claim, rel_tol=CLAIM_TOLERANCE, abs_tol=1e-9):
        yield f"{name}: relative weight error {error:.6g}, but the manifest claims {claim:.6g}"


def linear_problems(facts: LinearFacts) -> Iterator[str]:
    """Problems of one linear's four tensors."""
    for suffix in ("weight_global_scale", "input_global_scale"):
        value = getattr(facts, suffix)
        if not (math.isfinite(value) and value > 0):
            yield f"{suffix}: expected finite and above 0, found {value}"
    if not facts.are_scales_sound:
        yield "weight_scale: expected finite and above 0 everywhere"
    if not facts.are_spans_equal:
        yield "weight_scale: expected the two scales of every 32 inputs to be equal (scale_span 32)"
    if facts.has_minus_zero:
        yield "weight_packed: holds code 8 (minus zero)"
    if facts.num_illegal:
        yield (
            f"weight_packed: {int(facts.num_illegal)} groups of 8 inputs keep more than 2 of 4"
            " pairs"
        )
