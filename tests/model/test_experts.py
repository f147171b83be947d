"""The mixture that stands in for transformers' own, with and without W4A4 activations, and the cache of decoded experts."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from p48ray.model.experts import ActivationScales, ExpertCache, ExpertWeights, RoutedExperts, RoutedInputs, intermediate
from tests.stages.slow_nvfp4 import quantize_tokens

NUM_EXPERTS, HIDDEN, SIZE, TOP_K = 6, 64, 32, 2


def random_weights(seed: int = 0) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE))
    return [ExpertWeights(*(0.2 * torch.randn(s, generator=generator) for s in shapes)) for _ in range(NUM_EXPERTS)]


def random_call(tokens: int = 40, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(x, expert ids, router weights); expert 0 gets no token."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = 1 + torch.rand(tokens, NUM_EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN, generator=generator), ids_TK, torch.rand(tokens, TOP_K, generator=generator) + 0.1


def transformers_module(weights: list[ExpertWeights]) -> DeepseekV3Experts:
    config = DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=SIZE, n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, hidden_act="silu"
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
    expected = transformers_module([ExpertWeights(*(w.float() for w in e)) for e in weights]).bfloat16()(x_TH.bfloat16(), ids_TK, router_TK)
    found = RoutedExperts(NUM_EXPERTS, weights.__getitem__)(x_TH.bfloat16(), ids_TK, router_TK)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("group", [16, 32])
def test_w4a4_mixture_is_the_definition_token_by_token(group: int) -> None:
    weights, (x_TH, ids_TK, router_TK) = random_weights(), random_call(tokens=12)
    scales = ActivationScales(gate_up=2688 / 2.5, down=2688 / 1.1, group=group)  # above 2.5 and 1.1 activations saturate
    found = RoutedExperts(NUM_EXPERTS, weights.__getitem__, scales)(x_TH, ids_TK, router_TK)
    xq_TH = quantize_tokens(x_TH, scales.gate_up, group).float()
    expected = torch.zeros_like(x_TH)
    for token in range(len(x_TH)):
        for expert, share in zip(ids_TK[token].tolist(), router_TK[token], strict=True):
            w, x_1H = weights[expert], xq_TH[token : token + 1]
            h_1F = F.silu(x_1H @ w.gate_FH.T) * (x_1H @ w.up_FH.T)
            expected[token] += share * (quantize_tokens(h_1F, scales.down, group).float() @ w.down_HF.T)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = RoutedExperts(NUM_EXPERTS, weights.__getitem__)(x_TH, ids_TK, router_TK)
    assert not torch.allclose(found, plain, rtol=1e-2)


def test_observer_sees_raw_inputs_and_the_largest_intermediate_of_the_routed_experts() -> None:
    weights, (x_TH, ids_TK, router_TK) = random_weights(), random_call()
    seen: list[RoutedInputs] = []
    RoutedExperts(NUM_EXPERTS, weights.__getitem__, observe=seen.append)(x_TH, ids_TK, router_TK)
    amax = max(intermediate(x_TH[(ids_TK == e).any(1)], weights[e]).abs().max().item() for e in range(1, NUM_EXPERTS))
    assert len(seen) == 1
    assert torch.equal(seen[0].hidden_TH, x_TH) and torch.equal(seen[0].expert_ids_TK, ids_TK)
    assert torch.equal(seen[0].router_weights_TK, router_TK)
    assert seen[0].amax_intermediate.item() == pytest.approx(amax, rel=1e-6)
    unrouted = intermediate(x_TH, ExpertWeights(*(100 * w for w in weights[0])))
    assert unrouted.abs().max() > amax, "expert 0 would have had a larger one, but no token went there"


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


# The cache

EXPERT_BYTES = 3 * SIZE * HIDDEN * 4


def counting_cache(budget_bytes: int) -> tuple[ExpertCache, list[int]]:
    decoded: list[int] = []
    weights = random_weights()

    def decode(expert: int) -> ExpertWeights:
        decoded.append(expert)
        return weights[expert]

    return ExpertCache(decode, budget_bytes), decoded


Access = Callable[[int], ExpertWeights]


def test_cache_decodes_an_expert_once_while_it_fits() -> None:
    cache, decoded = counting_cache(6 * EXPERT_BYTES)
    results = [cache(e) for e in (0, 1, 2, 3, 4, 5, 0, 3, 5)]
    assert decoded == [0, 1, 2, 3, 4, 5]
    assert results[6] is results[0]


def test_cache_drops_the_least_recently_used_beyond_its_budget() -> None:
    cache, decoded = counting_cache(2 * EXPERT_BYTES)
    for expert in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, because 0 was used since
        cache(expert)
        assert len(cache.held) <= 2
    assert decoded == [0, 1, 2, 1]


@pytest.mark.parametrize("budget_bytes", [0, 1, EXPERT_BYTES - 1, EXPERT_BYTES, 2 * EXPERT_BYTES - 1])
def test_cache_of_less_than_two_experts_holds_the_last_one(budget_bytes: int) -> None:
    cache, decoded = counting_cache(budget_bytes)
    for expert in (0, 0, 1, 1, 0):
        cache(expert)
        assert list(cache.held) == [expert]
    assert decoded == [0, 1, 0]
