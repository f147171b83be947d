"""FP8 sources: decoded as the definition says, found by their scales, refused for every way of not
holding together."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from p48ray.checkpoint.decode import decode_fp8, read_experts, read_plain
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.fp8 import Fp8Weight, plain_tensors, scale_shape
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.errors import SourceError
from p48ray.store import LocalStore
from tests.reference import fp8, tiny_families, whole_model

EXPERT, ATTENTION = (
    "model.layers.2.mlp.experts.5.up_proj",
    "model.layers.1.self_attn.kv_a_proj_with_mqa",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.write_release("deepseek_v3", tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture
def index(folder: Path) -> CheckpointIndex:
    return open_checkpoint(LocalStore(folder))


def edited(index: CheckpointIndex, name: str, **values: Any) -> CheckpointIndex:
    return replace(index, tensors={**index.tensors, name: replace(index.tensors[name], **values)})


def without(index: CheckpointIndex, name: str) -> CheckpointIndex:
    assert name in index.tensors
    return replace(index, tensors={n: e for n, e in index.tensors.items() if n != name})


def announced(index: CheckpointIndex, **values: object) -> CheckpointIndex:
    config = copy.deepcopy(index.config)
    config["quantization_config"].update(values)
    return replace(index, config=config)


def test_every_code_decodes_to_its_value() -> None:
    """All 254 finite codes under scales that are no powers of two; BF16 has more bits than E4M3, so
    only the product rounds."""
    codes = [c for c in range(256) if c & 0x7F != 0x7F]
    weight = torch.tensor([codes, codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 1 / 3, 1.2345e-4, 7e4):
        scale_inv = torch.full((1, 2), scale)
        assert torch.equal(
            decode_fp8(weight, scale_inv, (128, 128)).view(torch.int16),
            fp8.decode(weight, scale_inv).view(torch.int16),
        )
    assert (
        fp8.e4m3_value(0x7E) == 448
        and fp8.e4m3_value(0x01) == 2.0**-9
        and fp8.e4m3_value(0xB8) == -1.0
    )


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("shape", [(256, 384), (200, 129), (96, 300), (1, 128), (130, 7)])
def test_blocks_are_cut_at_the_edges(shape: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(*scale_shape(shape, block), generator=generator) + 0.1
    assert torch.equal(decode_fp8(weight, scale_inv, block), fp8.decode(weight, scale_inv, block))


def test_bf16_scales_are_read_too() -> None:
    weight, scale_inv = fp8.encode(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    rounded = scale_inv.to(torch.bfloat16)
    assert torch.equal(decode_fp8(weight, rounded, (128, 128)), fp8.decode(weight, rounded.float()))


@pytest.mark.parametrize("bad", ["code", "scale"])
def test_what_is_not_finite_is_refused(bad: str) -> None:
    weight, scale_inv = fp8.encode(torch.ones(32, 32))
    if bad == "code":
        weight.view(torch.uint8)[3, 4] = 0x7F
    else:
        scale_inv[0, 0] = torch.inf
    with pytest.raises(SourceError, match=r"here: expected finite values, found \d+ of 1024"):
        decode_fp8(weight, scale_inv, (128, 128), "here")


def test_layout_says_fp8_and_experts_decode(index: CheckpointIndex, folder: Path) -> None:
    layout = describe_model(index)
    assert (layout.expert_storage, layout.fp8_block, layout.int4_group_size) == (
        "fp8",
        (128, 128),
        None,
    )
    assert (layout.moe_layers, layout.passthrough_expert_layers, layout.num_experts) == (
        (1, 2),
        (3,),
        8,
    )
    tensors = whole_model.read_all(folder)
    for projection, weight in read_experts(index, layout, 2, [5])[5].items():
        stem = f"model.layers.2.mlp.experts.5.{projection}"
        assert torch.equal(
            weight, fp8.decode(tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale_inv"])
        )


def test_plain_tensors_are_all_others_without_scales(index: CheckpointIndex, folder: Path) -> None:
    layout = describe_model(index)
    plain = {tensor.name: tensor for tensor in plain_tensors(index, layout)}
    compressed = set(tiny_families.expert_linears("deepseek_v3"))
    stored = whole_model.read_all(folder)
    assert set(plain) == {
        n for n in stored if n.rpartition(".")[0] not in compressed and not n.endswith("_scale_inv")
    }
    decoded = {name for name, tensor in plain.items() if isinstance(tensor, Fp8Weight)}
    assert decoded == {n for n in plain if stored[n].dtype == torch.float8_e4m3fn}
    assert "model.layers.3.mlp.experts.7.down_proj.weight" in decoded, (
        "of the layer of multi-token prediction"
    )
    assert "model.layers.1.mlp.gate.weight" not in decoded
    for name, tensor in read_plain(index.store, plain.values()).items():
        expected = (
            fp8.decode(stored[name], stored[f"{name}_scale_inv"])
            if name in decoded
            else stored[name]
        )
        assert (tensor.dtype, plain[name].shape, plain[name].num_bytes) == (
            expected.dtype,
            expected.shape,
            expected.numel() * expected.itemsize,
        )
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("stem", [EXPERT, ATTENTION])
def test_either_half_of_an_fp8_weight_needs_the_other(index: CheckpointIndex, stem: str) -> None:
    weight, scale = f"{stem}.weight", f"{stem}.weight_scale_inv"
    with pytest.raises(
        SourceError,
        match=rf"^model-\S+: tensor {weight}: expected its scales in {scale}, found none",
    ):
        describe_model(without(index, scale))
    with pytest.raises(
        SourceError,
        match=rf"^model-\S+: tensor {scale}: expected a weight {weight} in F8_E4M3, found none",
    ):
        describe_model(without(index, weight))
    with pytest.raises(
        SourceError, match=rf"tensor {scale}: expected a weight {weight} in F8_E4M3, found BF16"
    ):
        describe_model(edited(index, weight, dtype="BF16"))


@pytest.mark.parametrize(
    ("values", "found"), [({"shape": (1, 3)}, r"F32 \[1, 3\]"), ({"dtype": "I32"}, r"I32 \[1, 2\]")]
)
def test_scales_of_another_form_are_refused(
    index: CheckpointIndex, values: dict[str, Any], found: str
) -> None:
    name = f"{ATTENTION}.weight_scale_inv"
    with pytest.raises(
        SourceError,
        match=(
            rf"tensor {name}: expected F32 or BF16 \[1, 2\], one per block of 128 x 128, found"
            rf" {found}"
        ),
    ):
        describe_model(edited(index, name, **values))


def test_other_fp8_tensors_are_refused(index: CheckpointIndex) -> None:
    for values in ({"dtype": "F8_E5M2"}, {"dtype": "F8_E4M3", "shape": (80, 192, 1)}):
        with pytest.raises(
            SourceError,
            match=(
                rf"tensor {ATTENTION}\.weight: expected FP8 in matrices called \.weight, as"
                r" F8_E4M3, found F8_E"
            ),
        ):
            describe_model(edited(index, f"{ATTENTION}.weight", **values))
    with pytest.raises(
        SourceError,
        match=(
            r"tensor model\.layers\.1\.mlp\.gate\.e_score_correction_bias: expected FP8 in matrices"
        ),
    ):
        describe_model(
            edited(index, "model.layers.1.mlp.gate.e_score_correction_bias", dtype="F8_E4M3")
        )


def test_experts_stored_otherwise_than_the_first_are_refused(index: CheckpointIndex) -> None:
    plain = edited(without(index, f"{EXPERT}.weight_scale_inv"), f"{EXPERT}.weight", dtype="BF16")
    with pytest.raises(
        SourceError,
        match=(
            rf"tensor {EXPERT}\.weight_scale_inv: expected weight, weight_scale_inv for this"
            r" linear, found weight"
        ),
    ):
        describe_model(plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quant_method": "gptq"},
            r"quantization_config\.quant_method: expected 'fp8' for model\.\S+ .*found 'gptq'",
        ),
        ({"fmt": "e5m2"}, r"quantization_config\.fmt: expected 'e4m3' .*found 'e5m2'"),
        (
            {"weight_block_size": [128]},
            (
                r"quantization_config\.weight_block_size: expected two positive integers .*found"
                r" \[128\]"
            ),
        ),
        (
            {"weight_block_size": [128, 0]},
            r"weight_block_size: expected two positive integers .*found \[128, 0\]",
        ),
        (
            {"weight_block_size": None},
            r"weight_block_size: expected two positive integers .*found None",
        ),
        (
            {"weight_block_size": [64, 64]},
            r"expected F32 or BF16 \[\d, \d\], one per block of 64 x 64",
        ),
    ],
)
def test_config_has_to_announce_the_fp8_that_is_there(
    index: CheckpointIndex, values: dict[str, object], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        describe_model(announced(index, **values))
