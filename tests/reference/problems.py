"""Random linears with correlated inputs: what the solvers are for."""

import torch
from torch import Tensor


def correlated(
    seed: int, num_experts: int, num_outputs: int, num_inputs: int, num_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """(weight (N, O, I), mean second moment of the inputs (N, I, I)), float32. The spectrum of the
    inputs falls over 1.5 decades."""
    generator = torch.Generator().manual_seed(seed)
    tokens = num_tokens or 8 * num_inputs
    directions = (
        torch.randn(num_experts, num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    )
    x = torch.randn(num_experts, tokens, num_inputs, generator=generator) @ (
        torch.logspace(0, -1.5, num_inputs)[:, None] * directions
    )
    weight = 0.02 * torch.randn(num_experts, num_outputs, num_inputs, generator=generator)
    return weight, x.mT @ x / tokens


def identity(num_experts: int, num_inputs: int) -> Tensor:
    return torch.eye(num_inputs).repeat(num_experts, 1, 1)
