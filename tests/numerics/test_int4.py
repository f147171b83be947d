"""INT4 to floats against compressed-tensors' own decoder, bit for bit."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics.int4 import decode_int4


def random_linear(
    rows: int, inputs: int, group: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """All words, so all codes at all places; scales of both signs over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (rows, inputs // 8), generator=generator).to(
        torch.int32
    )
    scale = torch.randn(rows, inputs // group, generator=generator) * 10.0 ** torch.randint(
        -6, 3, (rows, inputs // group), generator=generator
    )
    return packed, scale.to(dtype)


def definition(packed: Tensor, scale: Tensor) -> Tensor:
    inputs = packed.shape[1] * 8
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4,
            type="int",
            symmetric=True,
            strategy="group",
            group_size=inputs // scale.shape[1],
        ),
    )
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor([packed.shape[0], inputs]),
    }
    weight: Tensor = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "inputs", "group"), [(48, 256, 32), (7, 64, 64), (5, 128, 16), (3, 64, 8)]
)
def test_decoder_is_compressed_tensors(
    dtype: torch.dtype, rows: int, inputs: int, group: int
) -> None:
    packed, scale = random_linear(rows, inputs, group, dtype)
    found, expected = decode_int4(packed, scale), definition(packed, scale)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


def test_arguments_are_left_as_they_were() -> None:
    packed, scale = random_linear(8, 64, 32, torch.bfloat16)
    before = packed.clone(), scale.clone()
    decode_int4(packed, scale)
    assert torch.equal(packed, before[0]) and torch.equal(scale, before[1])


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_fill_the_inputs_are_refused(groups: int) -> None:
    with pytest.raises(NumericsError, match=f"divide 64 inputs, found {groups}"):
        decode_int4(torch.zeros(2, 8, dtype=torch.int32), torch.ones(2, groups))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "inputs", "group"), [(2048, 7168, 32), (7, 64, 64), (5, 128, 16), (3, 64, 8)]
)
def test_kernel_is_the_torch_code(rows: int, inputs: int, group: int) -> None:
    packed, scale = random_linear(rows, inputs, group, torch.bfloat16)
    assert torch.equal(decode_int4(packed.cuda(), scale.cuda()).cpu(), decode_int4(packed, scale))
