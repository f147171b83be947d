"""What a manifest says of linears that are zero: an expert that was pruned, in whole or in part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p48ray.model.experts import ExpertWeights, RoutedInputs
from p48ray.numerics.zeros import ZERO_INPUTS, ZERO_WEIGHTS
from p48ray.unit.compress import compress_unit
from p48ray.unit.context import StageContext
from tests.stages.slow_nvfp4 import decode_weights
from tests.unit.conftest import PAIR, Opener, shard_bytes
from tests.unit.test_compress import GRADIENTS, Shard, record_of

PRUNED, WHOLE = PAIR.experts
Prune = Callable[..., None]
BOTH = f"{ZERO_WEIGHTS}; {ZERO_INPUTS}"


@pytest.fixture
def prune(monkeypatch: pytest.MonkeyPatch) -> Prune:
    """Has one expert of the source decoded as its weights times given factors."""

    def with_factors(gate: float, up: float, down: float) -> None:
        decoded = StageContext.decoded

        def scaled(
            self: StageContext, layer: int, expert: int, stored: dict[str, Tensor]
        ) -> ExpertWeights:
            found = decoded(self, layer, expert, stored)
            if expert != PRUNED:
                return found
            pairs = zip(found, (gate, up, down), strict=True)
            return ExpertWeights(*(w * factor for w, factor in pairs))

        monkeypatch.setattr(StageContext, "decoded", scaled)

    return with_factors


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (GRADIENTS, "compression.code_sweeps=1", "compression.refine_steps=3"),
        ("compression.solver=sparsegpt_gptq",),
    ],
    ids=["plain", "gradients", "one-shot"],
)
@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((0, 0, 0), (ZERO_WEIGHTS, ZERO_WEIGHTS, BOTH)),
        ((1, 0, 1), ("", ZERO_WEIGHTS, ZERO_INPUTS)),
        ((0, 1, 1), (ZERO_WEIGHTS, "", ZERO_INPUTS)),
        ((1, 1, 0), ("", "", ZERO_WEIGHTS)),
        ((1e-30, 1e-30, 1e-30), (ZERO_WEIGHTS, ZERO_WEIGHTS, BOTH)),
        ((1, 1e-30, 1), ("", ZERO_WEIGHTS, ZERO_INPUTS)),
    ],
    ids=["all", "up", "gate", "down", "tiny", "tiny up"],
)
def test_pruned_expert_is_zero_and_no_fallback(
    opened: Opener,
    prune: Prune,
    tmp_path: Path,
    factors: tuple[float, ...],
    expected: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    context = opened(*overrides)
    untouched = compress_unit(opened(*overrides), PAIR)
    prune(*factors)
    manifest = compress_unit(context, PAIR)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for projection, factor, reason in zip(
        ("gate_proj", "up_proj", "down_proj"), factors, expected, strict=True
    ):
        record = record_of(manifest, PRUNED, projection)
        assert record.outcome == ("zero" if reason else "solved"), projection
        assert record.reason == reason
        linear = shard.linear(1, PRUNED, projection)
        assert torch.isfinite(decode_weights(linear)).all()
        assert linear["weight_global_scale"].item() > 0
        assert (linear["weight_scale"].float() > 0).all()
        if factor == 0:
            assert not linear["weight_packed"].any()
            assert record.relative_weight_error == record.relative_output_error == 0
        elif factors == (1, 1e-30, 1) and factor == 1e-30:
            # gate's global scale, which up shares, ends long before
            assert not linear["weight_packed"].any()
            assert record.relative_weight_error == 1
        else:
            assert linear["weight_packed"].any()
            assert 0.01 < record.relative_weight_error < 0.6
        assert record_of(manifest, WHOLE, projection) == record_of(untouched, WHOLE, projection)


def test_layer_whose_inputs_are_zero_is_all_zero_with_a_scale_of_one(
    opened: Opener, layer_inputs: RoutedInputs, tmp_path: Path
) -> None:
    seen = layer_inputs._replace(
        hidden_TH=torch.zeros_like(layer_inputs.hidden_TH),
        amax_by_expert_E=torch.zeros_like(layer_inputs.amax_by_expert_E),
        group_amax_G=torch.zeros(1),
    )
    context = opened(seen=seen)
    manifest = compress_unit(context, PAIR)
    assert manifest.input_global_scales == (1.0, 1.0)
    assert {(r.outcome, r.reason) for r in manifest.linears} == {("zero", ZERO_INPUTS)}
    assert {r.relative_output_error for r in manifest.linears} == {0.0}
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    linear = shard.linear(1, PRUNED, "down_proj")
    assert linear["input_global_scale"].item() == 1
    assert torch.isfinite(decode_weights(linear)).all() and linear["weight_packed"].any()


def test_intermediates_that_only_compression_made_zero_are_a_fallback(
    opened: Opener, prune: Prune
) -> None:
    """Up's weights are lost under gate's scale, though they were worth something."""
    prune(1, 1e-9, 1)
    manifest = compress_unit(opened(), PAIR)
    assert record_of(manifest, PRUNED, "up_proj").outcome == "solved"
    down = record_of(manifest, PRUNED, "down_proj")
    assert (down.outcome, down.reason) == ("round_to_nearest", "the Hessian is zero")
    assert down.relative_output_error == pytest.approx(1)
