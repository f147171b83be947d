"""Names, rows and scalars of ModelOpt's layout: what goes there comes back."""

import math
import struct

import pytest
import torch

from p48ray.checkpoint.modelopt import (
    dense_from_modelopt,
    divisor_problem,
    factor_of,
    factor_problem,
    modelopt_tensors,
    rename_rows,
    tensor_forms,
)
from p48ray.errors import SourceError

LINEAR = "model.layers.1.mlp.experts.0.up_proj"


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def dense() -> dict[str, torch.Tensor]:
    return {
        f"{LINEAR}.weight_global_scale": torch.tensor([7.0]),
        f"{LINEAR}.input_global_scale": torch.tensor([0.3]),
        f"{LINEAR}.weight_scale": torch.ones(2, 2).to(torch.float8_e4m3fn),
        f"{LINEAR}.weight_packed": torch.arange(32, dtype=torch.uint8).reshape(2, 16),
    }


def test_scalars_are_reciprocals_without_axes_and_all_else_is_the_same_bytes() -> None:
    found = modelopt_tensors(dense())
    assert list(found) == [
        f"{LINEAR}.{s}" for s in ("weight_scale_2", "input_scale", "weight_scale", "weight")
    ]
    assert found[f"{LINEAR}.weight_scale_2"].shape == ()
    assert float(found[f"{LINEAR}.weight_scale_2"]) == float32(1 / 7)
    assert float(found[f"{LINEAR}.input_scale"]) == float32(1 / float32(0.3))
    assert torch.equal(found[f"{LINEAR}.weight"], dense()[f"{LINEAR}.weight_packed"])


def test_factor_is_the_float32_nearest_to_the_exact_reciprocal() -> None:
    """Python's float64 division rounded again is exact: 53 bits are more than twice 24 and two."""
    for number in torch.rand(2000, generator=torch.Generator().manual_seed(1)).tolist():
        for divisor in (float32(number * 1e4 + 1e-6), float32(number)):
            assert factor_of(divisor) == float32(1 / divisor)


def test_divisors_come_back_only_because_they_are_kept() -> None:
    """Several share a reciprocal: for about one in seven, 1/(1/x) is another float32."""
    numbers = 1 + torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    again = torch.tensor([factor_of(factor_of(x)) for x in numbers.tolist()])
    assert 0.1 < (again != numbers).float().mean() < 0.2
    x = float(numbers[again != numbers][0])
    tensors = dense() | {f"{LINEAR}.weight_global_scale": torch.tensor([x])}
    back = dense_from_modelopt(modelopt_tensors(tensors), {LINEAR: (x, float32(0.3))})
    assert list(back) == list(tensors)
    assert all(torch.equal(back[n].view(torch.uint8), tensors[n].view(torch.uint8)) for n in back)


def test_factor_of_another_divisor_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=rf"{LINEAR}\.input_scale: expected .*, found "):
        dense_from_modelopt(modelopt_tensors(dense()), {LINEAR: (7.0, 0.25)})
    assert factor_problem(factor_of(7.0), 7.0) is None


@pytest.mark.parametrize(
    "divisor", [0.0, -1.0, math.nan, math.inf, -math.inf, float32(1e-39), float32(3e38)]
)
def test_divisors_without_a_normal_reciprocal_are_refused(divisor: float) -> None:
    assert str(divisor) in (divisor_problem(divisor) or "")


@pytest.mark.parametrize("divisor", [1.0, 2688.0, float32(1e-38), float32(8e37)])
def test_any_other_divisor_is_taken(divisor: float) -> None:
    assert divisor_problem(divisor) is None


def test_rows_of_other_modules_keep_their_names_and_shapes() -> None:
    rows = [
        (f"{LINEAR}.weight_global_scale", "F32", (1,)),
        (f"{LINEAR}.weight_packed", "U8", (2, 16)),
        ("model.layers.0.self_attn.k_proj.input_global_scale", "F32", (1,)),
        ("lm_head.weight", "BF16", (8, 8)),
    ]
    there = rename_rows(rows, {LINEAR}, "modelopt")
    assert there == [
        (f"{LINEAR}.weight_scale_2", "F32", ()),
        (f"{LINEAR}.weight", "U8", (2, 16)),
        *rows[2:],
    ]
    assert rename_rows(there, {LINEAR}, "dense") == rows


def test_forms_of_tensors_by_the_codes_shape() -> None:
    assert tensor_forms((2, 16), "modelopt") == {
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
        "weight": ("U8", (2, 16)),
        "weight_scale": ("F8_E4M3", (2, 2)),
    }
