"""NVIDIA ModelOpt's layout of NVFP4 experts, and how names, header rows and tensors go to it from
dense storage and back.

    dense      weight_packed  weight_scale  weight_global_scale [1]  input_global_scale [1]
    modelopt   weight         weight_scale  weight_scale_2 []        input_scale []

Codes and block scales are the same bytes in both. The scalars are factors there and divisors here:
weight_scale_2 = 1/weight_global_scale, input_scale = 1/input_global_scale, in float32. Several
float32 share one reciprocal, so the way back takes the divisors from p48ray.json and holds the
factors against them.

Source: https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export (unified_export_hf) and
quantization/qtensor/nvfp4_tensor, version 0.47.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from p48ray.checkpoint.sparse_storage import (
    PACKED,
    SCALE,
    Storage,
    TensorRow,
    linear_form,
    stored_suffixes,
)
from p48ray.errors import SourceError

Form = Literal["dense", "sparse", "modelopt"]
"""What a finished checkpoint is written as: compressed-tensors in either storage, or ModelOpt."""

FORM_WORDS: Mapping[Form, str] = MappingProxyType(
    {"dense": "dense storage", "sparse": "sparse storage", "modelopt": "ModelOpt's layout"}
)

WEIGHT_DIVISOR, INPUT_DIVISOR = "weight_global_scale", "input_global_scale"
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {PACKED: "weight", SCALE: SCALE, WEIGHT_DIVISOR: "weight_scale_2", INPUT_DIVISOR: "input_scale"}
)
"""A dense tensor's suffix and the one that holds it there."""

DENSE_SUFFIXES: Mapping[str, str] = MappingProxyType({new: old for old, new in SUFFIXES.items()})
DIVISORS = (WEIGHT_DIVISOR, INPUT_DIVISOR)
SHAPES: Mapping[Form, tuple[int, ...]] = MappingProxyType(
    {"dense": (1,), "sparse": (1,), "modelopt": ()}
)
"""Of the scalars."""

GlobalScales = Mapping[str, tuple[float, float]]
"""Module name of a linear -> its weight_global_scale and its input_global_scale."""


def storage_in(form: Form) -> Storage:
    """The storage whose values a form holds: ModelOpt's are dense."""
    return "dense" if form == "modelopt" else form


def form_suffixes(suffix: str, form: Form) -> tuple[str, ...]:
    """A dense tensor's suffix as the suffixes that hold it."""
    return (SUFFIXES[suffix],) if form == "modelopt" else stored_suffixes(suffix, storage_in(form))


def tensor_forms(
    codes_shape: tuple[int, ...], form: Form
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of all of a linear's tensors, by suffix, from the shape of its codes."""
    found = dict.fromkeys(
        (s for divisor in DIVISORS for s in form_suffixes(divisor, form)), ("F32", SHAPES[form])
    )
    arrays = linear_form(codes_shape, storage_in(form))
    return found | {SUFFIXES[s] if form == "modelopt" else s: row for s, row in arrays.items()}


def renamed(name: str, linears: Collection[str], to: Form) -> str:
    """A tensor's name in ModelOpt's layout, or in dense storage. linears: that are compressed;
    every other tensor keeps its name."""
    linear, _, suffix = name.rpartition(".")
    names = SUFFIXES if to == "modelopt" else DENSE_SUFFIXES
    return f"{linear}.{names[suffix]}" if linear in linears and suffix in names else name


def rename_rows(rows: Iterable[TensorRow], linears: Collection[str], to: Form) -> list[TensorRow]:
    """A file's header rows in ModelOpt's layout, or in dense storage, in the same order.

    Args:
        linears: names of the linears to convert; every other tensor stays.
    """
    scalars = {suffix for divisor in DIVISORS for suffix in (divisor, SUFFIXES[divisor])}
    found: list[TensorRow] = []
    for name, dtype, shape in rows:
        linear, _, suffix = name.rpartition(".")
        is_scalar = linear in linears and suffix in scalars
        found.append((renamed(name, linears, to), dtype, SHAPES[to] if is_scalar else shape))
    return found


def modelopt_tensors(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compressed linears' dense tensors, by full name, in ModelOpt's layout."""
    found: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        linear, _, suffix = name.rpartition(".")
        found[f"{linear}.{SUFFIXES[suffix]}"] = (
            reciprocal(tensor).reshape(()) if suffix in DIVISORS else tensor
        )
    return found


def dense_from_modelopt(tensors: Mapping[str, Tensor], scales: GlobalScales) -> dict[str, Tensor]:
    """The inverse of modelopt_tensors. scales: the divisors that p48ray.json keeps.

    Raises: SourceError, naming the tensor, for a factor that is not the reciprocal of its divisor.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, suffix = name.rpartition(".")
        dense = DENSE_SUFFIXES[suffix]
        if dense in DIVISORS:
            divisor = scales[linear][DIVISORS.index(dense)]
            if problem := factor_problem(float(tensor), divisor):
                raise SourceError(f"{name}: {problem}")
            tensor = torch.tensor([divisor], dtype=torch.float32, device=tensor.device)
        found[f"{linear}.{dense}"] = tensor
    return found


def reciprocal(divisor: Tensor) -> Tensor:
    """1/x in float32, rounded to nearest."""
    return 1.0 / divisor.float()


def factor_of(divisor: float) -> float:
    """The factor that is stored for a float32 divisor."""
    return float(reciprocal(torch.tensor(divisor, dtype=torch.float32)))


def divisor_problem(divisor: float) -> str | None:
    """Why no factor can stand for it; None where one can. A factor below float32's normal numbers
    is 0 on a GPU that flushes them."""
    if not (math.isfinite(divisor) and divisor > 0):
        return f"expected finite and above 0, found {divisor}"
    factor = factor_of(divisor)
    if not torch.finfo(torch.float32).tiny <= factor < math.inf:
        return f"expected one whose reciprocal is a normal float32, found {divisor} (1/x: {factor})"
    return None


def factor_problem(factor: float, divisor: float) -> str | None:
    """How a stored factor differs from what its divisor demands; None where it does not."""
    expected = factor_of(divisor)
    return (
        None
        if factor == expected
        else f"expected {expected}, which is 1/{divisor} of p48ray.json, found {factor}"
    )
