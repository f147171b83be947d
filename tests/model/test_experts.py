"""The mixture that stands in for transformers' own: forward with and without W4A4 activations,
several calls at once, and the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from p48ray.model.experts import (
    INTERMEDIATE_STRIDE,
    ActivationScales,
    ExpertWeights,
    RoutedCall,
    RoutedExperts,
    RoutedInputs,
    intermediate,
    routes_by_expert,
)
from tests.stages.slow_nvfp4 import quantize_tokens

NUM_EXPERTS, HIDDEN, SIZE, TOP_K = 6, 64, 32, 2


def random_weights(seed: int = 0) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE))
    return [
        ExpertWeights(*(0.2 * torch.randn(s, generator=generator) for s in shapes))
        for _ in range(NUM_EXPERTS)
    ]


def random_call(tokens: int = 40, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(x, expert ids, router weights); expert 0 gets no token."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = 1 + torch.rand(tokens, NUM_EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        ids_TK,
        torch.rand(tokens, TOP_K, generator=generator) + 0.1,
    )


def transformers_module(weights: list[ExpertWeights]) -> DeepseekV3Experts:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=SIZE,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    module = DeepseekV3Experts(config).float().eval().requires_grad_(False)
    state = {
        "gate_up_proj": torch.stack([torch.cat([w.gate_FH, w.up_FH]) for w in weights]),
        "down_proj": torch.stack([w.down_HF for w in weights]),
    }
    module.load_state_dict(state)
    return module


def test_mixture_equals_the_transformers_experts_module() -> None:
    weights, call = random_weights(), random_call()
    expected = transformers_module(weights)(*call)
    found = RoutedExperts(NUM_EXPERTS, weights.__getitem__)(*call)
    assert expected.abs().max() > 0.1
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_mixture_in_bf16_equals_the_transformers_experts_module_in_bf16() -> None:
    weights = [ExpertWeights(*(w.bfloat16() for w in expert)) for expert in random_weights()]
    x_TH, ids_TK, router_TK = random_call()
    expected = transformers_module(
        [ExpertWeights(*(w.float() for w in e)) for e in weights]
    ).bfloat16()(x_TH.bfloat16(), ids_TK, router_TK)
    found = RoutedExperts(NUM_EXPERTS, weights.__getitem__)(x_TH.bfloat16(), ids_TK, router_TK)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("group", [16, 32])
def test_w4a4_mixture_is_the_definition_token_by_token(group: int) -> None:
    weights, (x_TH, ids_TK, router_TK) = random_weights(), random_call(tokens=12)
    # above 2.5 and 1.1 activations saturate
    scales = ActivationScales(gate_up=2688 / 2.5, down=2688 / 1.1, group=group)
    found = RoutedExperts(NUM_EXPERTS, weights.__getitem__, scales)(x_TH, ids_TK, router_TK)
    xq_TH = quantize_tokens(x_TH, scales.gate_up, group).float()
    expected = torch.zeros_like(x_TH)
    for token in range(len(x_TH)):
        for expert, share in zip(ids_TK[token].tolist(), router_TK[token], strict=True):
            w, x_1H = weights[expert], xq_TH[token : token + 1]
            h_1F = F.silu(x_1H @ w.gate_FH.T) * (x_1H @ w.up_FH.T)
            expected[token] += (
                share * (quantize_tokens(h_1F, scales.down, group).float() @ w.down_HF.T)[0]
            )
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = RoutedExperts(NUM_EXPERTS, weights.__getitem__)(x_TH, ids_TK, router_TK)
    assert not torch.allclose(found, plain, rtol=1e-2)


def test_observer_sees_raw_inputs_and_the_largest_intermediate_of_the_routed_experts() -> None:
    weights, (x_TH, ids_TK, router_TK) = random_weights(), random_call()
    seen: list[RoutedInputs] = []
    RoutedExperts(NUM_EXPERTS, weights.__getitem__, observe=seen.append)(x_TH, ids_TK, router_TK)
    assert len(seen) == 1
    assert torch.equal(seen[0].hidden_TH, x_TH) and torch.equal(seen[0].expert_ids_TK, ids_TK)
    assert torch.equal(seen[0].router_weights_TK, router_TK)
    largest = [
        intermediate(x_TH[(ids_TK == e).any(1)], weights[e]).abs().amax().item()
        for e in range(1, NUM_EXPERTS)
    ]
    assert seen[0].amax_by_expert_E.tolist() == pytest.approx([0.0, *largest], rel=1e-6)
    some = [
        intermediate(x_TH[(ids_TK == e).any(1)], weights[e])[::INTERMEDIATE_STRIDE]
        for e in range(1, NUM_EXPERTS)
    ]
    groups = torch.cat([h.unflatten(1, (-1, 16)).abs().amax(-1).flatten() for h in some])
    torch.testing.assert_close(seen[0].group_amax_G, groups, rtol=1e-5, atol=0)
    unrouted = intermediate(x_TH, ExpertWeights(*(100 * w for w in weights[0])))
    assert unrouted.abs().max() > max(largest), (
        "expert 0 would have had a larger one, but no token went there"
    )


def test_weights_are_asked_for_only_where_tokens_go() -> None:
    asked: list[int] = []
    weights = random_weights()

    def get(expert: int) -> ExpertWeights:
        asked.append(expert)
        return weights[expert]

    x_TH, _, router_TK = random_call(tokens=3)
    RoutedExperts(NUM_EXPERTS, get)(x_TH, torch.tensor([[4, 2], [2, 4], [4, 2]]), router_TK)
    assert asked == [2, 4]


def test_mixture_leaves_its_inputs_as_they_were() -> None:
    weights, call = random_weights(), random_call()
    before = [t.clone() for t in call]
    RoutedExperts(NUM_EXPERTS, weights.__getitem__, ActivationScales(100.0, 100.0, 16))(*call)
    assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True))


# Several calls together


def test_calls_made_together_give_what_each_gives_alone_and_ask_for_an_expert_once() -> None:
    asked: list[int] = []
    weights = random_weights()

    def get(expert: int) -> ExpertWeights:
        asked.append(expert)
        return weights[expert]

    calls = [random_call(tokens, seed) for tokens, seed in ((40, 1), (7, 2), (23, 3))]
    seen: list[RoutedInputs] = []
    experts = RoutedExperts(NUM_EXPERTS, get, observe=seen.append)
    with experts.deferred() as recorded:
        zeros = [experts(*call) for call in calls]
    assert all(
        not z.any() and z.shape == call[0].shape for z, call in zip(zeros, calls, strict=True)
    )
    assert not asked
    together = experts.outputs(recorded)
    assert asked == sorted(set(asked)) == [1, 2, 3, 4, 5]
    alone = [RoutedExperts(NUM_EXPERTS, weights.__getitem__)(*call) for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert [len(s.hidden_TH) for s in seen] == [40, 7, 23], "one observation a call, in order"


def test_calls_are_answered_again_once_they_are_no_longer_deferred() -> None:
    experts, call = RoutedExperts(NUM_EXPERTS, random_weights().__getitem__), random_call()
    with pytest.raises(ZeroDivisionError), experts.deferred():
        raise ZeroDivisionError
    assert experts(*call).any()


def test_routes_are_the_rows_and_slots_of_every_expert_in_order() -> None:
    _, ids_TK, _ = random_call(tokens=50)
    for expert, (rows, slots) in enumerate(routes_by_expert(ids_TK.to(torch.int16), NUM_EXPERTS)):
        expected = torch.where(ids_TK == expert)
        assert torch.equal(rows, expected[0]) and torch.equal(slots, expected[1])


# The backward pass


def test_gradients_are_autograds_in_float64() -> None:
    """Through SwiGLU, router weights and the sum over experts; at inputs and at router weights."""
    weights = [ExpertWeights(*(w.double() for w in expert)) for expert in random_weights()]
    calls, at_outputs = [], []
    for tokens, seed in ((30, 1), (11, 2)):
        x_TH, ids_TK, router_TK = random_call(tokens, seed)
        calls.append(RoutedCall(x_TH.double(), ids_TK, router_TK.double()))
        at_outputs.append(
            torch.randn(
                tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
        )
    experts = RoutedExperts(NUM_EXPERTS, weights.__getitem__)
    found = experts.gradients(calls, at_outputs)
    for call, gradient_TH, (at_inputs_TH, at_router_TK) in zip(
        calls, at_outputs, found, strict=True
    ):
        x_TH, router_TK = (
            call.hidden_TH.clone().requires_grad_(True),
            call.router_weights_TK.clone().requires_grad_(True),
        )
        expected = torch.autograd.grad(
            experts(x_TH, call.expert_ids_TK, router_TK), (x_TH, router_TK), gradient_TH
        )
        assert expected[0].abs().max() > 0.1 and expected[1].abs().max() > 0.1
        torch.testing.assert_close(at_inputs_TH, expected[0], rtol=1e-10, atol=1e-12)
        # summed in float32
        torch.testing.assert_close(at_router_TK, expected[1], rtol=1e-6, atol=1e-6)


def test_no_gradient_is_taken_through_quantized_activations() -> None:
    experts, call = (
        RoutedExperts(
            NUM_EXPERTS, random_weights().__getitem__, ActivationScales(100.0, 100.0, 16)
        ),
        random_call(),
    )
    with pytest.raises(AssertionError):
        experts.gradients([RoutedCall(*call)], [call[0]])
