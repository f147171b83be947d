"""Decoded experts: equal to an independent formula bit for bit, the same from every relative, and
refused where the source is unsound."""

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from p48ray.checkpoint.decode import decode_linear, read_expert, read_experts
from p48ray.checkpoint.families import ModelLayout, describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.errors import SourceError
from p48ray.store import MemoryStore
from tests.checkpoint.tiny_variants import decode_reference

NAN_BF16 = b"\xc0\x7f"
INF_BF16 = b"\x80\x7f"


def packed_linear(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """(out, in) codes 0..15 as the source stores them."""
    words = (codes.reshape(codes.shape[0], -1, 8).to(torch.int64) << torch.arange(0, 32, 4)).sum(-1)
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int32),
    }


def test_every_expert_linear_of_the_sample_equals_the_formula(
    tiny: CheckpointIndex, layout: ModelLayout, tiny_tensors: dict[str, Tensor]
) -> None:
    num_linears = 0
    for layer in layout.moe_layers:
        for expert, weights in read_experts(tiny, layout, layer, range(layout.num_experts)).items():
            for projection, weight in weights.items():
                name = layout.expert_linear_name(layer, expert, projection)
                expected = decode_reference(
                    tiny_tensors[f"{name}.weight_packed"], tiny_tensors[f"{name}.weight_scale"]
                )
                assert weight.dtype == torch.bfloat16
                assert tuple(weight.shape) == layout.linear_shape(projection)
                assert torch.equal(weight, expected), name
                num_linears += 1
    assert num_linears == 4 * 16 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_of_the_sixteen_codes_is_code_minus_eight_times_scale(
    layout: ModelLayout, dtype: torch.dtype
) -> None:
    codes = torch.arange(16).repeat_interleave(4).reshape(2, 32)
    scale = torch.tensor([[0.3], [-1.7]], dtype=dtype)
    weight = decode_linear(packed_linear(codes, scale), layout)
    expected = ((codes.double() - 8) * scale.double()).to(dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, expected)
    assert len({float(value) for value in weight.flatten()}) == 16


def test_each_code_is_right_at_each_place_of_a_word(layout: ModelLayout) -> None:
    codes = (torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16
    scale = torch.stack([torch.full((16,), 1.0), torch.full((16,), 2.0)], dim=1).bfloat16()
    weight = decode_linear(packed_linear(codes, scale), layout)
    assert torch.equal(weight[:, :32], (codes[:, :32] - 8).bfloat16())
    assert torch.equal(weight[:, 32:], ((codes[:, 32:] - 8) * 2).bfloat16())


def test_all_relatives_give_the_same_experts(variants: dict[str, CheckpointIndex]) -> None:
    reference = variants["nested_int4"]
    expected = {
        layer: read_experts(reference, describe_model(reference), layer, range(16))
        for layer in (1, 4)
    }
    for index in variants.values():
        layout = describe_model(index)
        for layer, experts in expected.items():
            found = read_experts(index, layout, layer, range(16))
            assert all(
                torch.equal(found[expert][name], weight)
                for expert in experts
                for name, weight in experts[expert].items()
            )


def test_one_expert_equals_its_part_of_several(tiny: CheckpointIndex, layout: ModelLayout) -> None:
    several = read_experts(tiny, layout, 2, range(3, 6))
    assert list(several) == [3, 4, 5]
    one = read_expert(tiny, layout, 2, 4)
    assert tuple(one) == PROJECTIONS
    assert all(torch.equal(one[projection], several[4][projection]) for projection in PROJECTIONS)
    assert read_experts(tiny, layout, 2, range(0)) == {}


def test_inputs_are_left_as_they_were(layout: ModelLayout) -> None:
    tensors = packed_linear(torch.arange(64).reshape(2, 32) % 16, torch.ones(2, 1).bfloat16())
    before = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
    decode_linear(tensors, layout)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[suffix], before[suffix]) for suffix in before)


def damaged(store: MemoryStore, name: str, new: bytes) -> CheckpointIndex:
    """The start of one tensor's bytes overwritten."""
    entry = open_checkpoint(store).tensors[name]
    data = bytearray(store.get(entry.file))
    data[entry.start : entry.start + len(new)] = new
    store.put(entry.file, bytes(data))
    return open_checkpoint(store)


@pytest.mark.parametrize("bad", [NAN_BF16, INF_BF16])
def test_scales_that_are_not_finite_are_refused_naming_file_and_key(
    copy_of_tiny: Callable[[], MemoryStore], bad: bytes
) -> None:
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight_scale"
    index = damaged(copy_of_tiny(), name, bad)
    layout = describe_model(index)
    with pytest.raises(
        SourceError,
        match=(
            rf"^{index.tensors[name].file}: tensor {name}: expected finite values, found 1 of 1024"
        ),
    ):
        read_expert(index, layout, 1, 3)
    read_expert(index, layout, 1, 2)


def test_plain_weights_that_are_not_finite_are_refused(
    variants: dict[str, CheckpointIndex],
) -> None:
    source = variants["flat_bf16"]
    store = MemoryStore(uuid.uuid4().hex)
    for info in source.store.list():
        store.put(info.key, source.store.get(info.key))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    index = damaged(store, name, NAN_BF16)
    with pytest.raises(
        SourceError,
        match=(
            rf"^{index.tensors[name].file}: tensor {name}: expected finite values, found 1 of 32768"
        ),
    ):
        read_expert(index, describe_model(index), 1, 3)


def test_weight_shape_that_contradicts_the_words_is_refused(
    copy_of_tiny: Callable[[], MemoryStore],
) -> None:
    name = "language_model.model.layers.1.mlp.experts.3.down_proj.weight_shape"
    index = damaged(copy_of_tiny(), name, (128).to_bytes(4, "little") + (256).to_bytes(4, "little"))
    with pytest.raises(
        SourceError,
        match=(
            rf"^{index.tensors[name].file}: tensor {name}: expected \[256, 128\].*found \[128,"
            r" 256\]"
        ),
    ):
        read_expert(index, describe_model(index), 1, 3)


def test_scale_of_another_grouping_is_refused(layout: ModelLayout) -> None:
    tensors = packed_linear(torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 1).bfloat16())
    with pytest.raises(
        SourceError, match=r"f: tensor x\.weight_scale: expected shape \[2, 2\], found \[2, 1\]"
    ):
        decode_linear(tensors, layout, "f: tensor x")


def test_expert_that_the_index_lacks_is_named(tiny: CheckpointIndex, layout: ModelLayout) -> None:
    with pytest.raises(
        SourceError,
        match=(
            r"tensor language_model\.model\.layers\.1\.mlp\.experts\.16\.gate_proj\.weight_packed:"
            r" expected"
        ),
    ):
        read_expert(tiny, layout, 1, 16)


def test_only_the_wanted_experts_bytes_are_read(
    tiny: CheckpointIndex, layout: ModelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(uuid.uuid4().hex)
    for info in tiny.store.list():
        store.put(info.key, tiny.store.get(info.key))
    sizes: list[int] = []
    real = MemoryStore.get_range

    def note(self: MemoryStore, key: str, start: int, num_bytes: int) -> bytes:
        sizes.append(num_bytes)
        return real(self, key, start, num_bytes)

    monkeypatch.setattr(MemoryStore, "get_range", note)
    monkeypatch.setattr("p48ray.checkpoint.tensors.MAX_GAP_BYTES", 0)
    read_expert(replace(tiny, store=store), layout, 1, 0)
    assert sum(sizes) == sum(
        tiny.tensors[name].num_bytes for name in layout.expert_tensor_names(1, 0)
    )
    assert len(sizes) == 2  # the sample's writer put words and shapes together, and scales behind
