"""NVFP4 against compressed-tensors bit for bit, and scales against a search one float at a time."""

import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1, nvfp4
from tests.reference import formats

SCHEME: QuantizationScheme = preset_name_to_scheme("NVFP4", ["Linear"])
GLOBALS = [1.0, 3.7e-6, 5376.123, 1.1e9, 2.0**100]


def all_scale_bytes() -> Tensor:
    """The 126 positive E4M3 values."""
    return torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)


def theirs_compressed(values_OI: Tensor, scale_OG: Tensor, global_scale: Tensor) -> Tensor:
    """Codes by compressed-tensors, minus zero mapped to zero."""
    state = {
        "weight": values_OI,
        "weight_scale": scale_OG.float(),
        "weight_global_scale": global_scale,
    }
    codes = e2m1.unpack(NVFP4PackedCompressor.compress(state, SCHEME)["weight_packed"])
    return torch.where(codes == 8, 0, codes).to(torch.uint8)


def theirs_decompressed(codes_OI: Tensor, scale_OG: Tensor, global_scale: Tensor) -> Tensor:
    state = {
        "weight_packed": e2m1.pack(codes_OI),
        "weight_scale": scale_OG,
        "weight_global_scale": global_scale,
    }
    return NVFP4PackedCompressor.decompress(state, SCHEME)["weight"]


def random_linear(seed: int, outputs: int = 24, inputs: int = 128, size: float = 0.02) -> Tensor:
    """(1, O, I) float32 with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = size * torch.randn(1, outputs, inputs, generator=generator)
    return torch.where(torch.rand(values.shape, generator=generator) < 0.01, 20 * values, values)


@pytest.mark.parametrize("global_scale", GLOBALS)
def test_all_codes_under_all_scales_decode_as_compressed_tensors_does(global_scale: float) -> None:
    scale = all_scale_bytes()[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scale), 1)
    divisor = torch.tensor([global_scale])
    ours = nvfp4.dequantize(codes[None], scale[None], divisor)[0]
    theirs = theirs_decompressed(codes, scale, divisor)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(ours.bfloat16().view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("global_scale", GLOBALS)
def test_values_and_ties_under_all_scales_encode_as_compressed_tensors_does(
    global_scale: float,
) -> None:
    divisor = torch.tensor([global_scale])
    scale = all_scale_bytes()[:, None]
    grid = torch.tensor(
        [0.0, 0.25, 0.3, 0.5, 0.75, 1.25, 1.75, 2.2, 2.5, 3.5, 4.9, 5.0, 5.1, 6.0, 7.0, 100.0]
    )
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    values = (grid * signs)[None] * nvfp4.effective_scale(scale[None], divisor)[0]
    ours = nvfp4.quantize(values[None], scale[None], divisor)[0]
    assert torch.equal(ours, theirs_compressed(values, scale, divisor))
    assert not (ours == 8).any()


@pytest.mark.parametrize("span", [16, 32])
@pytest.mark.parametrize("size", [1e-12, 0.02, 1e12])
def test_random_linears_agree_with_compressed_tensors_both_ways(span: int, size: float) -> None:
    values = random_linear(1, size=size)
    divisor = nvfp4.global_scale_from_amax(values.abs().amax((1, 2)))
    scale = nvfp4.choose_scales(values, divisor, span, search=True)
    codes = nvfp4.quantize(values, scale, divisor)
    assert torch.equal(codes[0], theirs_compressed(values[0], scale[0], divisor))
    decoded = nvfp4.dequantize(codes, scale, divisor)[0]
    assert torch.equal(decoded.bfloat16(), theirs_decompressed(codes[0], scale[0], divisor))
    assert (decoded - values[0]).norm() / values[0].norm() < 0.12


def test_e4m3_rounding_is_nearest_even_and_saturates() -> None:
    values = torch.tensor(formats.e4m3_values())
    points = torch.cat(
        [values, (values[1:] + values[:-1]) / 2, torch.tensor([449.0, 1e9, 2.0**-11])]
    )
    near = torch.cat(
        [
            points,
            torch.nextafter(points, torch.tensor(torch.inf)),
            torch.nextafter(points, torch.tensor(0.0)),
        ]
    )
    x = torch.cat([near, -near])
    assert nvfp4.round_to_e4m3(x).tolist() == [formats.e4m3(v) for v in x.tolist()]


def test_global_scale_is_the_divisor_that_puts_amax_at_the_top_of_both_ranges() -> None:
    amax = torch.tensor([6.0, 2688.0, 0.013, 448.0])
    scale = nvfp4.global_scale_from_amax(amax)
    assert scale.tolist() == [
        448.0,
        1.0,
        (torch.tensor([2688.0]) / torch.tensor([0.013])).item(),
        6.0,
    ]


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1e-30, 3.4e38])
def test_global_scale_is_finite_and_positive_and_leaves_normal_scales(amax: float) -> None:
    scale = nvfp4.global_scale_from_amax(torch.tensor([amax]))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    smallest = nvfp4.effective_scale(torch.tensor([[2.0**-9]]).to(torch.float8_e4m3fn), scale)
    assert (smallest >= torch.finfo(torch.float32).tiny).all()


def test_global_scale_of_zeros_is_one() -> None:
    assert nvfp4.global_scale_from_amax(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("span", [16, 32])
@pytest.mark.parametrize("search", [True, False])
def test_scales_are_those_of_a_search_one_float_at_a_time(span: int, search: bool) -> None:
    values = random_linear(2, outputs=16, inputs=64)
    divisor = nvfp4.global_scale_from_amax(values.abs().amax((1, 2)))
    scale = nvfp4.choose_scales(values, divisor, span, search)[0].float()
    for row, chosen in zip(values[0], scale, strict=True):
        expected = [
            formats.span_scale(part.tolist(), divisor.item(), search) for part in row.split(span)
        ]
        assert chosen.tolist() == [s for s in expected for _ in range(span // 16)]


def test_span_32_repeats_its_byte() -> None:
    scale = nvfp4.choose_scales(random_linear(3), torch.tensor([1000.0]), 32, search=True).view(
        torch.uint8
    )
    assert torch.equal(scale[..., 0::2], scale[..., 1::2])
    assert len(scale.unique()) > 5


def test_search_never_has_a_higher_error_and_lowers_it_overall() -> None:
    values = random_linear(4)
    divisor = nvfp4.global_scale_from_amax(values.abs().amax((1, 2)))

    def errors(search: bool) -> Tensor:
        scale = nvfp4.choose_scales(values, divisor, 16, search)
        decoded = nvfp4.dequantize(nvfp4.quantize(values, scale, divisor), scale, divisor)
        return (decoded - values).square().unflatten(2, (-1, 16)).sum(-1)

    assert (errors(True) <= errors(False) * (1 + 1e-6)).all()
    assert errors(True).sum() < 0.95 * errors(False).sum()


def test_factor_one_wins_ties() -> None:
    values = torch.zeros(1, 1, 16)
    # exact under factor 1, and every larger factor saturates to the same byte
    values[..., 0] = 6.0 * 448
    assert nvfp4.choose_scales(values, torch.tensor([1.0]), 16, search=True).float().item() == 448.0
    values[..., 0] = 6.0  # 6 * 1 is exact under factor 1; so is 4 * 1.5 under factor 1.5
    assert nvfp4.choose_scales(values, torch.tensor([1.0]), 16, search=True).float().item() == 1.0


@pytest.mark.parametrize(("value", "expected"), [(0.0, 2.0**-9), (1e-9, 2.0**-9), (1e9, 448.0)])
def test_scales_stay_within_e4m3(value: float, expected: float) -> None:
    scale = nvfp4.choose_scales(torch.full((1, 2, 16), value), torch.tensor([1.0]), 16, search=True)
    assert scale.float().tolist() == [[[expected]] * 2]


def test_scales_do_not_depend_on_how_many_spans_are_searched_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, divisor = random_linear(5), torch.tensor([500.0])
    whole = nvfp4.choose_scales(values, divisor, 16, search=True)
    monkeypatch.setattr(nvfp4, "_SEARCH_ELEMENTS", 1)
    assert torch.equal(
        nvfp4.choose_scales(values, divisor, 16, search=True).view(torch.uint8),
        whole.view(torch.uint8),
    )


def test_each_expert_of_a_batch_has_its_own_global_scale() -> None:
    values = torch.cat([random_linear(6), 1000 * random_linear(7)])
    divisor = nvfp4.global_scale_from_amax(values.abs().amax((1, 2)))
    scale = nvfp4.choose_scales(values, divisor, 16, search=True)
    codes = nvfp4.quantize(values, scale, divisor)
    for k in range(2):
        alone = nvfp4.choose_scales(values[k : k + 1], divisor[k : k + 1], 16, search=True)
        assert torch.equal(alone.view(torch.uint8), scale[k : k + 1].view(torch.uint8))
        assert torch.equal(
            nvfp4.quantize(values[k : k + 1], alone, divisor[k : k + 1]), codes[k : k + 1]
        )


@pytest.mark.parametrize(("inputs", "span"), [(48, 32), (64, 8), (64, 64), (24, 16)])
def test_spans_that_do_not_fit_are_refused(inputs: int, span: int) -> None:
    with pytest.raises(NumericsError, match="span of 16 or 32"):
        nvfp4.choose_scales(torch.zeros(1, 1, inputs), torch.ones(1), span, search=False)


def test_inputs_are_unchanged() -> None:
    values, divisor = random_linear(8), torch.tensor([700.0])
    before = values.clone()
    scale = nvfp4.choose_scales(values, divisor, 16, search=True)
    nvfp4.quantize(values, scale, divisor)
    assert torch.equal(values, before)


def test_dequantizing_packed_bytes_gives_the_same_bits() -> None:
    packed = torch.randint(
        256, (2, 3, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    scale = (
        torch.linspace(0.01, 400, 24).reshape(2, 3, 4)[..., [0, 1, 2, 3]].to(torch.float8_e4m3fn)
    )
    global_scale = torch.tensor([3.7, 1234.5])
    expected = nvfp4.dequantize(e2m1.unpack(packed), scale, global_scale)
    assert torch.equal(
        nvfp4.dequantize_packed(packed, scale, global_scale).view(torch.int32),
        expected.view(torch.int32),
    )
