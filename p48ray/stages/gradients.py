"""Gradients: the same stream backwards. What the model's own loss says about an error at each mixture's output.

At the head one label a position is sampled from the model's own distribution, so that the mean of g g^T over tokens is the Fisher information and not
the empirical one (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation"). The gradient of the summed cross-entropy then goes down layer by
layer: each is recomputed from its stored boundary and differentiated with respect to its activations only; one layer's weights are held at a time.

A mixture's routed output is added to the residual stream, so the gradient there, delta, is the gradient with respect to what leaves the layer.

Legend: B sequences, S positions, T = B S tokens, H hidden size, V vocabulary.
"""

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p48ray import run_root
from p48ray.errors import CalibrationError
from p48ray.manifest import GradientPart
from p48ray.model.decoder import Decoder, run_layer
from p48ray.model.experts import ExpertCache, RoutedExperts
from p48ray.plan import SequencePart
from p48ray.stages import arrow
from p48ray.stages.context import EXPERT_CACHE_BYTES, StageContext
from p48ray.stages.needs import read_needs

ROWS_PER_HEAD_CALL = 2048  # tokens whose logits exist at once
LABEL_SEED_STRIDE = 2**20  # parts of one calibration seed never share a stream of labels with another seed's


def gradient_parts(context: StageContext, parts: Sequence[int]) -> list[GradientPart]:
    """Take the given parts from the head down to the lowest open mixture, writing what is missing. Returns the manifests it wrote."""
    plan = context.plan
    decoder = context.decoder()
    needs = read_needs(plan, context.store)
    stream = GradientStream(context)
    ways = {p: needs.way_back(p) for p in parts}
    wanted = {p: needs.gradient_layers(p) for p in parts}
    positions = decoder.positions(plan.config.calibration.sequence_length)
    written: list[GradientPart] = []
    # Seconds since a part's last manifest: the head and layers that want no gradient count for the next that does.
    spent = dict.fromkeys(parts, 0.0)
    for number in range(plan.source.num_layers, -1, -1):
        waiting = [plan.parts[p] for p in parts if number in ways[p]]
        if not waiting:
            continue
        module = None  # lets go of the layer above before the next is read
        if any(number > ways[part.part][0] for part in waiting):
            module = layer_or_head(context, decoder, number)
        for part in waiting:
            start = time.monotonic()
            above_BSH = None if number == plan.source.num_layers else stream.take(number + 1, part)
            if number in wanted[part.part]:
                assert above_BSH is not None
                written.append(write_gradients(context, number, part, above_BSH.flatten(0, 1), start - spent[part.part]))
                start, spent[part.part] = time.monotonic(), 0.0
            if number > ways[part.part][0]:
                assert module is not None
                stream.put(number, part, step_down(context, module, stream.boundary(number, part), above_BSH, positions, part))
            stream.let_go(number, part)
            spent[part.part] += time.monotonic() - start
    return written


def layer_or_head(context: StageContext, decoder: Decoder, number: int) -> nn.Module:
    """The only weights held at a time: a layer's, or the head's, which stands above the last layer."""
    if number == context.plan.source.num_layers:
        return decoder.head()
    layer: nn.Module = decoder.layer(number, streaming_experts(context, number) if number in context.plan.source.moe_layers else None)
    return layer


def step_down(
    context: StageContext,
    module: nn.Module,
    entering_BSH: Tensor,
    above_BSH: Tensor | None,
    positions: tuple[Tensor, Tensor],
    part: SequencePart,
) -> Tensor:
    """Gradient with respect to what enters a layer, or the head where nothing comes from above."""
    calibration = context.plan.config.calibration
    if above_BSH is None:
        generator = torch.Generator().manual_seed(calibration.seed * LABEL_SEED_STRIDE + part.part)
        return head_gradient(module, entering_BSH, generator)
    return step_back(module, entering_BSH, above_BSH, positions, calibration.sequences_per_micro_batch)


def streaming_experts(context: StageContext, number: int) -> RoutedExperts:
    cache = ExpertCache(context.source_layer(number, context.compute_dtype), EXPERT_CACHE_BYTES)
    return RoutedExperts(context.layout.num_experts, cache)


@torch.enable_grad()
def step_back(layer: nn.Module, entering_BSH: Tensor, gradient_BSH: Tensor, positions: tuple[Tensor, Tensor], micro_batch: int) -> Tensor:
    """Gradient with respect to what enters a layer, given that with respect to what leaves it. By micro-batches of sequences, which are independent."""
    below = []
    for x, gradient in zip(entering_BSH.split(micro_batch), gradient_BSH.split(micro_batch), strict=True):
        leaf = x.detach().requires_grad_(True)
        out = run_layer(layer, leaf, positions, micro_batch)
        below.append(torch.autograd.grad(out, leaf, gradient)[0])
    return torch.cat(below)


@torch.enable_grad()
def head_gradient(head: nn.Module, entering_BSH: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy with sampled labels with respect to what enters the head: through the norm from softmax(logits) - one_hot(label)."""
    gradients = []
    for x_TH in entering_BSH.flatten(0, 1).split(ROWS_PER_HEAD_CALL):
        leaf = x_TH.detach().requires_grad_(True)
        logits_TV = head(leaf)
        probabilities_TV = logits_TV.detach().float().softmax(-1)
        labels_T = sample(probabilities_TV, generator)
        residue_TV = probabilities_TV.scatter_add(1, labels_T[:, None], -torch.ones_like(labels_T, dtype=torch.float32)[:, None])
        gradients.append(torch.autograd.grad(logits_TV, leaf, residue_TV.to(logits_TV.dtype))[0])
    return torch.cat(gradients).reshape(entering_BSH.shape)


def sample(probabilities_TV: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row by inverse transform; the uniform numbers come from the CPU, so that labels do not depend on the device's generator."""
    cumulative_TV = probabilities_TV.double().cumsum(-1)
    uniform_T = torch.rand(len(probabilities_TV), generator=generator, dtype=torch.float64).to(cumulative_TV.device)
    labels_T1 = torch.searchsorted(cumulative_TV, (uniform_T * cumulative_TV[:, -1])[:, None], right=True)
    return labels_T1[:, 0].clamp_max(probabilities_TV.shape[1] - 1)


class GradientStream:
    """Gradients of some parts at layer boundaries: in memory between layers, in the run root at every boundary."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.held: dict[int, tuple[int, Tensor]] = {}

    def boundary(self, number: int, part: SequencePart) -> Tensor:
        """What entered layer `number` on the way up, (B, S, H)."""
        return self.read(run_root.residual_part(number, part.part), "residual", part)

    def read(self, key: str, column: str, part: SequencePart) -> Tensor:
        values_TH = self.context.boundary(key, column)
        return values_TH.reshape(part.num_sequences, -1, values_TH.shape[-1])

    def take(self, number: int, part: SequencePart) -> Tensor:
        """Gradient with respect to what enters layer `number` (or the head), (B, S, H)."""
        layer, gradient_BSH = self.held.pop(part.part, (None, None))
        if layer == number and gradient_BSH is not None:
            return gradient_BSH
        return self.read(run_root.residual_gradient_part(number, part.part), "gradient", part)

    def put(self, number: int, part: SequencePart, gradient_BSH: Tensor) -> None:
        self.held[part.part] = (number, gradient_BSH)
        data = arrow.encode({"gradient": gradient_BSH.flatten(0, 1)})
        arrow.store_once(self.context.store, run_root.residual_gradient_part(number, part.part), data)

    def let_go(self, number: int, part: SequencePart) -> None:
        """Delete both boundaries that this layer was the last to read: what it leaves is stored."""
        if self.context.plan.config.run.keep != "all":
            self.context.store.delete(run_root.residual_part(number, part.part))
            self.context.store.delete(run_root.residual_gradient_part(number + 1, part.part))


def write_gradients(context: StageContext, layer: int, part: SequencePart, delta_TH: Tensor, start: float) -> GradientPart:
    """Store one part of a layer's gradients; the manifest last, an orphaned one first out of the way (see capture.write_activations).

    Raises: CalibrationError when a gradient is not finite.
    """
    mean_square = float(delta_TH.float().square().sum(1).mean())
    if not mean_square < float("inf"):
        raise CalibrationError(f"layer {layer}, part {part.part}: the gradients are not finite; is the source corrupt?")
    manifest_key = run_root.gradient_manifest(layer, part.part)
    if context.store.head(run_root.gradient_part(layer, part.part)) is None:
        context.store.delete(manifest_key)
    data = arrow.encode({"delta": delta_TH.to(torch.bfloat16)})
    data = arrow.store_once(context.store, run_root.gradient_part(layer, part.part), data)
    manifest = GradientPart(
        plan_digest=context.plan.digest,
        layer=layer,
        part=part.part,
        num_tokens=len(delta_TH),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        mean_square=mean_square,
        seconds=round(time.monotonic() - start, 3),
        finished_at=round(time.time(), 3),
    )
    context.store.put_if_absent(manifest_key, manifest.to_json())
    return manifest
