"""Gradients: the same stream backwards. What the model's own loss says about an error at each
mixture's output.

At the head one label a position is sampled from the model's own distribution, so that the mean of g
g^T over tokens is the Fisher information and not the empirical one (Kunstner et al. 2019,
"Limitations of the empirical Fisher approximation"). The gradient of the summed cross-entropy then
goes down layer by layer: each is recomputed from its stored boundary and differentiated with
respect to its activations only; one layer's weights are held at a time.

A mixture's routed output is added to the residual stream, so the gradient there, delta, is the
gradient with respect to what leaves the layer.

Legend: B sequences, S positions, T = B S tokens, H hidden size, V vocabulary, K experts a token.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from p48ray.errors import CalibrationError
from p48ray.model.decoder import Decoder, attend, routed_experts
from p48ray.run import run_root
from p48ray.run.manifest import GradientPart
from p48ray.run.needs import read_needs
from p48ray.run.plan import SequencePart
from p48ray.run.run_root import BlobKind
from p48ray.stages.blobs import Blob, BlobWriter
from p48ray.stages.capture import write_boundary
from p48ray.stages.recompute import remake_boundaries
from p48ray.stages.streaming import opened_layer, waves
from p48ray.unit.context import StageContext
from p48ray.unit.token_columns import to_columns

TOKENS_PER_HEAD_GRADIENT = 2048  # tokens whose logits exist at once
# parts of one calibration seed never share a stream of labels with another seed's
LABEL_SEED_STRIDE = 2**20


def gradient_parts(context: StageContext, parts: Sequence[int]) -> list[GradientPart]:
    """Take the given parts from the head down to the lowest open mixture, writing what is missing.
    Returns the manifests of gradients."""
    plan = context.plan
    decoder = context.decoder()
    needs = read_needs(plan, context.store)
    ways = {p: needs.backward_layers(p) for p in parts}
    with BlobWriter(context) as writer:
        stream = GradientStream(context, writer)
        backward = BackwardPass(
            context, decoder, stream, ways, {p: needs.gradient_layers(p) for p in parts}
        )
        for number in range(plan.source.num_layers, -1, -1):
            waiting = [plan.parts[p] for p in parts if number in ways[p]]
            if not waiting:
                continue
            stepping = [part.part for part in waiting if number > ways[part.part][0]]
            if stepping:
                start = time.monotonic()
                if not all(needs.has_blob("residuals", number, p) for p in stepping):
                    # what is run again has a writer of its own: one of them at a time holds blobs,
                    # and what is replaced is gone
                    writer.flush()
                needs = remake_boundaries(context, decoder, needs, stepping, number)
                for p in stepping:
                    backward.spent[p] += (time.monotonic() - start) / len(stepping)  # type: ignore[assignment]
            with layer_or_head(context, decoder, number) if stepping else nullcontext() as module:
                if any(number - 1 > ways[part.part][0] for part in waiting):
                    decoder.prefetch(number - 1)
                for wave in waves(plan, waiting):
                    backward.step(number, module, wave)
            del module  # the layer above goes before the next is read
        return [manifest for manifest in writer.drain() if isinstance(manifest, GradientPart)]


@dataclass(slots=True)
class BackwardPass:
    """The backward pass of some parts. `wanted`: layers whose gradient is still to be written, by
    part."""

    context: StageContext
    decoder: Decoder
    stream: "GradientStream"
    ways: dict[int, range]
    wanted: dict[int, list[int]]
    # Seconds since a part's last manifest: the head and layers that want no gradient count for the
    # next that does.
    spent: Counter[int] = field(default_factory=Counter)

    def step(self, number: int, module: nn.Module | None, wave: list[SequencePart]) -> None:
        """Write the gradients wanted at a layer's output, and take parts that go further down
        through it."""
        is_head = number == self.context.plan.source.num_layers
        above: dict[int, Tensor] = {}
        for part in wave:
            start = time.monotonic()
            if not is_head:
                above[part.part] = self.stream.take(number + 1, part)
            if number in self.wanted[part.part]:
                delta_TH = above[part.part].flatten(0, 1)
                begun = start - self.spent.pop(part.part, 0.0)
                write_gradients(self.context, self.stream.writer, number, part, delta_TH, begun)
                start = time.monotonic()
            self.spent[part.part] += time.monotonic() - start  # type: ignore[assignment]
        stepping = [part for part in wave if number > self.ways[part.part][0]]
        start = time.monotonic()
        if stepping:
            assert module is not None
            entering = [self.stream.boundary(number, part) for part in stepping]
            below = step_down(
                self.context,
                self.decoder,
                module,
                entering,
                [above.get(part.part) for part in stepping],
                stepping,
            )
            for part, gradient_BSH in zip(stepping, below, strict=True):
                self.stream.put(number, part, gradient_BSH, start)
        for part in wave:
            self.stream.delete_boundary(number, part)
            self.spent[part.part] += (time.monotonic() - start) / len(wave)  # type: ignore[assignment]


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


class GradientStream:
    """Gradients of some parts at layer boundaries: in memory between layers, in the run root at
    every boundary."""

    def __init__(self, context: StageContext, writer: BlobWriter) -> None:
        self.context, self.writer = context, writer
        self.held: dict[int, tuple[int, Tensor]] = {}

    def boundary(self, number: int, part: SequencePart) -> Tensor:
        """What entered layer `number` in the forward pass, (B, S, H)."""
        return self.read("residuals", number, part)

    def read(self, kind: BlobKind, number: int, part: SequencePart) -> Tensor:
        values_TH = self.context.boundary(kind, number, part.part)
        return values_TH.reshape(part.num_sequences, -1, values_TH.shape[-1])

    def take(self, number: int, part: SequencePart) -> Tensor:
        """Gradient with respect to what enters layer `number` (or the head), (B, S, H)."""
        layer, gradient_BSH = self.held.pop(part.part, (None, None))
        if layer == number and gradient_BSH is not None:
            return gradient_BSH
        return self.read("residual-gradients", number, part)

    def put(self, number: int, part: SequencePart, gradient_BSH: Tensor, start: float) -> None:
        """Keep the gradient with respect to what enters layer `number`.

        Args:
            number, part, start: as capture.write_boundary takes them.
            gradient_BSH: must not change any more.
        """
        self.held[part.part] = (number, gradient_BSH)
        write_boundary(self.writer, "residual-gradients", number, part, gradient_BSH, start)

    def delete_boundary(self, number: int, part: SequencePart) -> None:
        """Delete both boundaries that this layer was the last to read, once what it leaves is
        stored."""
        if self.context.plan.config.run.keep != "all":
            places: list[tuple[BlobKind, int]] = [
                ("residuals", number),
                ("residual-gradients", number + 1),
            ]
            keys = [
                key(kind, n, part.part)
                for kind, n in places
                for key in (run_root.blob_manifest, run_root.blob)
            ]
            self.writer.delete_after(part.part, keys)


def write_gradients(
    context: StageContext,
    writer: BlobWriter,
    layer: int,
    part: SequencePart,
    delta_TH: Tensor,
    start: float,
) -> None:
    """Have one part of a layer's gradients stored.

    Args:
        context, writer, layer, part: as capture.write_activations takes them.
        delta_TH: with respect to what leaves the layer, (B S, H).
        start: by the monotonic clock; the record's seconds are counted from it.
    Raises: CalibrationError when a gradient is not finite.
    """
    mean_square = delta_TH.float().square().sum(1).mean()
    if not bool(mean_square < float("inf")):
        raise CalibrationError(
            f"layer {layer}, part {part.part}: the gradients are not finite; is the source corrupt?"
        )
    writer.submit(
        Blob(
            record=GradientPart,
            kind="gradients",
            layer=layer,
            part=part.part,
            columns=to_columns("delta", delta_TH, context.plan.config.calibration.stored_bits),
            seconds=round(time.monotonic() - start, 3),
            values={"mean_square": mean_square},
        )
    )
