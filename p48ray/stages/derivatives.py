"""Gradients through one layer, or the head: by transformers' modules and autograd, the experts by
hand.

Legend: B sequences, S positions, T = B S tokens, H hidden size, V vocabulary, K experts a token.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from p48ray.model.decoder import Decoder, attend, routed_experts
from p48ray.run.plan import SequencePart
from p48ray.stages.streaming import opened_layer
from p48ray.unit.context import StageContext

TOKENS_PER_HEAD_GRADIENT = 2048  # tokens whose logits exist at once
# parts of one calibration seed never share a stream of labels with another seed's
LABEL_SEED_STRIDE = 2**20


@contextmanager
def layer_or_head(context: StageContext, decoder: Decoder, number: int) -> Iterator[nn.Module]:
    """The only weights held at a time: a layer's, or the head's, which stands above the last
    layer."""
    if number == context.plan.source.num_layers:
        yield decoder.head()
        return
    with opened_layer(context, decoder, number) as layer:
        yield layer


def step_down(
    context: StageContext,
    decoder: Decoder,
    module: nn.Module,
    entering: list[Tensor],
    above: list[Tensor | None],
    parts: list[SequencePart],
) -> list[Tensor]:
    """Gradients with respect to what enters a layer, or the head; (B, S, H) for each part.

    Args:
        context, decoder: of the run.
        module: the layer, or the head.
        entering: what entered it in the forward pass, (B, S, H) for each part.
        above: gradients with respect to what leaves the layer, likewise; all None for the head.
        parts: in the order of both; at the head their numbers seed the labels.
    """
    calibration = context.plan.config.calibration
    gradients = [gradient for gradient in above if gradient is not None]
    if not gradients:
        seeds = (calibration.seed * LABEL_SEED_STRIDE + part.part for part in parts)
        return [
            head_gradient(module, x, torch.Generator().manual_seed(s))
            for x, s in zip(entering, seeds, strict=True)
        ]
    positions = decoder.positions(calibration.sequence_length)
    return step_back(module, entering, gradients, positions, calibration.sequences_per_micro_batch)


def step_back(
    layer: nn.Module,
    entering: list[Tensor],
    gradients: list[Tensor],
    positions: tuple[Tensor, Tensor],
    micro_batch: int,
) -> list[Tensor]:
    """Gradients with respect to what enters a layer, given those with respect to what leaves it;
    one part each.

    Both halves of the layer are recomputed, the upper one first. The mixture's experts are
    differentiated by hand (RoutedExperts.gradients), all parts together, and their share enters
    autograd at the router's weights and the normalised inputs. So no graph holds an expert, and
    none more than a part.
    Args:
        layer: with its weights, which get no gradients.
        entering, gradients: (B, S, H) for each part, in the same order.
        positions: cos and sin of the rotary embedding.
        micro_batch: sequences that attention takes at once, as in the forward pass.
    Cost: attention runs twice forward; the routed experts' outputs are never needed.
    """
    with torch.no_grad():
        attended = [attend(layer, x, positions, micro_batch) for x in entering]
    for i, gradient_BSH in enumerate(through_mixture(layer, attended, gradients)):
        attended[i] = through_attention(layer, entering[i], gradient_BSH, positions, micro_batch)
    return attended


def through_mixture(layer: Any, attended: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Gradients with respect to the residual stream between attention and mixture (or dense
    block)."""
    experts = routed_experts(layer)
    if experts is None:
        return [
            vector_jacobian_product(
                x, (g,), lambda leaf: [leaf + layer.mlp(layer.post_attention_layernorm(leaf))]
            )
            for x, g in zip(attended, gradients, strict=True)
        ]
    with torch.no_grad(), experts.deferred() as calls:
        for x_BSH in attended:
            layer.mlp(layer.post_attention_layernorm(x_BSH))
    routed = experts.gradients(calls, [g.flatten(0, 1) for g in gradients])

    def outputs(leaf: Tensor) -> list[Tensor]:
        with experts.deferred() as again:
            out = leaf + layer.mlp(layer.post_attention_layernorm(leaf))
        return [out, again[0].hidden_TH, again[0].router_weights_TK]

    return [
        vector_jacobian_product(x, (g, *r), outputs)
        for x, g, r in zip(attended, gradients, routed, strict=True)
    ]


def through_attention(
    layer: Any,
    entering_BSH: Tensor,
    gradient_BSH: Tensor,
    positions: tuple[Tensor, Tensor],
    micro_batch: int,
) -> Tensor:
    """The rest of the way, by micro-batches of sequences, which are independent.

    Args:
        layer, positions, micro_batch: as step_back takes them.
        entering_BSH: what entered the layer in the forward pass, of one part.
        gradient_BSH: with respect to the residual stream after attention.
    """
    pairs = zip(entering_BSH.split(micro_batch), gradient_BSH.split(micro_batch), strict=True)
    with same_bits_every_time(entering_BSH.device):
        return torch.cat(
            [
                vector_jacobian_product(
                    x, (gradient,), lambda leaf: [attend(layer, leaf, positions, micro_batch)]
                )
                for x, gradient in pairs
            ]
        )


@contextmanager
def same_bits_every_time(device: torch.device) -> Iterator[None]:
    """On a GPU attention's backward pass adds up the queries' gradients in whatever order its
    blocks end, unless it is told not to.

    The switch is the process's; a process that streams does nothing else. cuBLAS is the same every
    time as it is used here, on one stream, but PyTorch wants to be told: the workspace named is its
    own default on these cards. Source: PyTorch, torch.use_deterministic_algorithms;
    scaled_dot_product_attention's notes.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # which only helps to find reads of what nobody wrote
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@torch.enable_grad()
def vector_jacobian_product(
    at: Tensor, gradients: Sequence[Tensor], function: Callable[[Tensor], list[Tensor]]
) -> Tensor:
    """The vector-Jacobian product of `function`, which has one output for each gradient, at a
    point."""
    leaf = at.detach().requires_grad_(True)
    return torch.autograd.grad(function(leaf), leaf, list(gradients))[0]


@torch.enable_grad()
def head_gradient(head: nn.Module, entering_BSH: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy with sampled labels with respect to what enters the
    head: through the norm from softmax(logits) - one_hot(label)."""
    gradients = []
    for x_TH in entering_BSH.flatten(0, 1).split(TOKENS_PER_HEAD_GRADIENT):
        leaf = x_TH.detach().requires_grad_(True)
        logits_TV = head(leaf)
        probabilities_TV = logits_TV.detach().float().softmax(-1)
        labels_T = sample_labels(probabilities_TV, generator)
        residue_TV = probabilities_TV.scatter_add(
            1, labels_T[:, None], -torch.ones_like(labels_T, dtype=torch.float32)[:, None]
        )
        gradients.append(torch.autograd.grad(logits_TV, leaf, residue_TV.to(logits_TV.dtype))[0])
    return torch.cat(gradients).reshape(entering_BSH.shape)


def sample_labels(probabilities_TV: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row by inverse transform; the uniform numbers come from the CPU, so that labels
    do not depend on the device's generator."""
    cumulative_TV = probabilities_TV.double().cumsum(-1)
    uniform_T = torch.rand(len(probabilities_TV), generator=generator, dtype=torch.float64).to(
        cumulative_TV.device
    )
    labels_T1 = torch.searchsorted(
        cumulative_TV, (uniform_T * cumulative_TV[:, -1])[:, None], right=True
    )
    return labels_T1[:, 0].clamp_max(probabilities_TV.shape[1] - 1)
