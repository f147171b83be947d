"""Paired-4:8 experts as others write them, one by one: what is read, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from p48ray.checkpoint.foreign import (
    MINUS_ZERO,
    foreign_storage,
    is_foreign,
    read_linear,
    shared_expert,
    weight_values,
)
from p48ray.checkpoint.layout import ExpertStorage
from p48ray.errors import SourceError
from tests.reference.foreign import Arrays, config_of, own_divisor, quantized, sparse_weight

NAME = "layers.1.mlp.experts.0.up_proj"
STORAGES: tuple[ExpertStorage, ...] = ("paired48", "paired48-dense")


def paired_weight(seed: int) -> np.ndarray:
    """(16, 64) of which 2 of 4 pairs are kept; rows of very different sizes."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(16, 8, 4, 2)) * 10.0 ** rng.uniform(-3, 0, (16, 1, 1, 1))
    keep = rng.random((16, 8, 4)).argsort(-1) < 2
    return (values * keep[..., None]).reshape(16, 64)


def arrays_of(
    weight: np.ndarray, storage: ExpertStorage = "paired48", factor: float = 1.0
) -> Arrays:
    divisor = own_divisor(weight) * np.float32(factor)
    return quantized(weight, divisor, NAME, storage == "paired48")


def tensors_of(arrays: Arrays) -> dict[str, Tensor]:
    """By suffix."""
    found = {}
    for name, (dtype, array) in arrays.items():
        tensor = torch.from_numpy(np.array(array))
        suffix = name.removeprefix(f"{NAME}.")
        found[suffix] = tensor.view(torch.float8_e4m3fn) if dtype == "F8_E4M3" else tensor
    return found


def raw_of(arrays: Arrays) -> dict[str, tuple[str, list[int], bytes]]:
    return {n: (dtype, list(a.shape), a.tobytes()) for n, (dtype, a) in arrays.items()}


@pytest.mark.parametrize("storage", STORAGES)
def test_values_are_those_of_an_independent_reader(storage: ExpertStorage) -> None:
    weight = paired_weight(0)
    found = read_linear(tensors_of(arrays_of(weight, storage)), storage, NAME)
    expected = sparse_weight(raw_of(arrays_of(weight)), NAME)
    assert np.abs(expected - weight).max() < np.abs(weight).max() / 4 and expected.any()
    torch.testing.assert_close(
        weight_values(found).double(), torch.from_numpy(expected), rtol=1e-6, atol=0
    )


def test_library_of_the_format_reads_their_dense_storage_as_the_same_values() -> None:
    config = QuantizationConfig.model_validate(config_of({}, False)["quantization_config"])
    arrays = arrays_of(paired_weight(0), "paired48-dense")
    theirs = NVFP4PackedCompressor.decompress(tensors_of(arrays), config.config_groups["group_0"])[
        "weight"
    ]
    ours = weight_values(read_linear(tensors_of(arrays), "paired48-dense", NAME))
    assert theirs.dtype == torch.bfloat16
    torch.testing.assert_close(theirs.float(), ours, rtol=2.0**-8, atol=0)


def test_minus_zero_becomes_zero_and_no_other_code_changes() -> None:
    weight = paired_weight(1)
    theirs = tensors_of(arrays_of(weight, "paired48-dense"))["weight_packed"]
    found = read_linear(tensors_of(arrays_of(weight)), "paired48", NAME).packed
    before, after = (torch.stack([p & 15, p >> 4], -1).flatten() for p in (theirs, found))
    assert int((before == MINUS_ZERO).sum()) > 3
    assert torch.equal(after, torch.where(before == MINUS_ZERO, 0, before).to(torch.uint8))


def three_in_a_group(tensors: dict[str, Tensor]) -> None:
    tensors["weight_packed"][2, 4:7] = 0x11


def three_bits(tensors: dict[str, Tensor]) -> None:
    tensors["weight_sparse_mask"][3, 1] = 0x37


def zero_scale(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"].view(torch.uint8)[0, 1] = 0


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"].view(torch.uint8)[5, 0] = 0x7F


def negative_scale(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"].view(torch.uint8)[5, 0] |= 0x80


def scalar(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].fill_(value) and None


@pytest.mark.parametrize(
    ("damage", "storage", "message"),
    [
        (three_in_a_group, "paired48-dense", r"weight_packed: .*1 groups .*\(2, 1\)"),
        (three_bits, "paired48", "weight_sparse_mask: .*exactly 2 of 4 bits.*0111"),
        (zero_scale, "paired48", r"weight_scale: .*1 of 32 .*\(0, 1\): 0.0"),
        (nan_scale, "paired48", r"weight_scale: .*1 of 32 .*\(5, 0\): nan"),
        (negative_scale, "paired48", r"weight_scale: .*1 of 32 .*\(5, 0\): -"),
        (scalar("weight_global_scale", 0), "paired48", "weight_global_scale: .*above 0, found 0.0"),
        (scalar("weight_global_scale", np.nan), "paired48", "weight_global_scale: .*found nan"),
        (scalar("input_global_scale", np.inf), "paired48", "input_global_scale: .*found inf"),
        (scalar("input_global_scale", -1), "paired48", "input_global_scale: .*found -1.0"),
    ],
)  # fmt: skip
def test_what_is_unsound_is_named(
    damage: Callable[[dict[str, Tensor]], None], storage: ExpertStorage, message: str
) -> None:
    tensors = tensors_of(arrays_of(paired_weight(2), storage))
    damage(tensors)
    with pytest.raises(SourceError, match=f"^f.safetensors: tensor {NAME}.{message}"):
        read_linear(tensors, storage, f"f.safetensors: tensor {NAME}")


def expert(gate_factor: float, up_factor: float) -> dict[str, Any]:
    factors = {"gate_proj": gate_factor, "up_proj": up_factor, "down_proj": 1.0}
    weight = paired_weight(3)
    return {
        p: read_linear(tensors_of(arrays_of(weight, factor=f)), "paired48", p)
        for p, f in factors.items()
    }


WHERE = {p: p for p in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize(("gate_factor", "up_factor", "gives_way"), [
    (1.0, 0.8, "gate_proj"), (0.7, 1.0, "up_proj"), (1.0, 1.0, None),
])  # fmt: skip
def test_larger_global_scale_gives_way(
    gate_factor: float, up_factor: float, gives_way: str | None
) -> None:
    before = expert(gate_factor, up_factor)
    after, foldings = shared_expert(before, WHERE)
    assert list(foldings) == ([gives_way] if gives_way else [])
    gate, up = after["gate_proj"], after["up_proj"]
    shared = min(before["gate_proj"].weight_divisor, before["up_proj"].weight_divisor)
    assert gate["weight_global_scale"].tolist() == up["weight_global_scale"].tolist() == [shared]
    for projection, tensors in after.items():
        assert tensors["weight_global_scale"].shape == tensors["input_global_scale"].shape == (1,)
        first, second = tensors["weight_scale"].float().unflatten(-1, (-1, 2)).unbind(-1)
        assert torch.equal(first, second) and tensors["weight_scale"].shape == (16, 4)
        if projection not in foldings:
            assert torch.equal(first, before[projection].scale.float())
            assert torch.equal(tensors["weight_packed"], before[projection].packed)
    for projection, folding in foldings.items():
        ratio = shared / before[projection].weight_divisor
        exact = before[projection].scale.double() * ratio
        found = after[projection]["weight_scale"].double()[:, ::2]
        assert folding.ratio == ratio < 1
        assert folding.num_groups == 32 and 0 < folding.num_rounded <= 32
        rounding = float(((found - exact).abs() / exact).max())
        assert folding.largest_rounding == pytest.approx(rounding) and rounding > 0


def test_group_whose_scale_vanishes_becomes_zero() -> None:
    before = expert(1.0, 1e-4)  # up's own scales keep their E4M3 numbers, so gate's shrink
    after, foldings = shared_expert(before, WHERE)
    folding = foldings["gate_proj"]
    assert folding.num_vanished > 0 and folding.largest_rounding == 1
    scale, packed = after["gate_proj"]["weight_scale"], after["gate_proj"]["weight_packed"]
    assert float(scale.float().min()) == 2.0**-9
    spans_OSB = packed.unflatten(-1, (-1, 16))
    exact = before["gate_proj"].scale.double() * folding.ratio
    is_gone = exact <= 2.0**-10
    assert int(is_gone.sum()) == folding.num_vanished
    assert not spans_OSB[is_gone].any() and spans_OSB[~is_gone].any()


def test_inputs_of_gate_and_up_are_scaled_alike() -> None:
    arrays = {p: tensors_of(arrays_of(paired_weight(4))) for p in WHERE}
    arrays["up_proj"]["input_global_scale"].fill_(2.0)
    linears = {p: read_linear(t, "paired48", p) for p, t in arrays.items()}
    with pytest.raises(SourceError, match=r"up_proj.input_global_scale: expected gate's 1.0.* 2.0"):
        shared_expert(linears, WHERE)


def test_config_says_which_storage() -> None:
    for is_sparse, storage in ((True, "paired48"), (False, "paired48-dense")):
        config = config_of({"model_type": "kimi_k25"}, is_sparse)
        assert is_foreign(config) and foreign_storage(config) == storage


def test_other_configs_are_not_theirs() -> None:
    assert not is_foreign({}) and not is_foreign({"quantization_config": None})
    config = config_of({}, is_sparse=False)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    assert not is_foreign(config)
    config = config_of({}, is_sparse=True)
    config["quantization_config"]["format"] = "pack-quantized"
    assert not is_foreign(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("config_groups",), {}, r"config_groups: expected one group, found \[\]"),
        (
            ("config_groups", "group_0", "input_activations"),
            None,
            "input_activations: .*None",
        ),
        (("config_groups", "group_0", "weights", "group_size"), 16, "weights.group_size: .*32.*16"),
        (("config_groups", "group_0", "weights", "type"), "int", "weights.type: .*'float'.*'int'"),
        (
            ("config_groups", "group_0", "input_activations", "group_size"),
            16,
            "input_activations.group_size: expected 32",
        ),
        (
            ("config_groups", "group_0", "input_activations", "dynamic"),
            False,
            "input_activations.dynamic: expected 'local'",
        ),
        (("paired48_sparse",), {"layout": "pair-bitmask", "version": 2}, "paired48_sparse: .*2"),
    ],
)
def test_config_that_can_not_be_read_is_named(
    path: tuple[str, ...], value: object, message: str
) -> None:
    config = copy.deepcopy(config_of({}, is_sparse=True))
    place = config["quantization_config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SourceError, match=f"^config.json: quantization_config.*{message}"):
        foreign_storage(config)
