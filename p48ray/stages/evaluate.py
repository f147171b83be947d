"""Evaluate: held-out text through the source and through the finished checkpoint, side by side, one layer at a time.

The compressed model's experts are decoded from the written files and their inputs quantized to NVFP4 as the server does (W4A4 emulation); everything
else is the same bytes in both. So the difference is what a server of the checkpoint would lose, kernel rounding apart.
"""

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.sparse_storage import Storage, dense_tensors, storage_of, stored_suffixes
from p48ray.checkpoint.tensors import read_tensors
from p48ray.config import EvaluationConfig, RunConfig
from p48ray.errors import ConfigError
from p48ray.manifest import EvaluationPart
from p48ray.model.decoder import Decoder, run_layer
from p48ray.model.documents import digest_documents
from p48ray.model.expert_loader import layer_experts
from p48ray.model.experts import ActivationScales, ExpertWeights, RoutedExperts
from p48ray.numerics import e2m1, nvfp4
from p48ray.plan import RunPlan, SequencePart
from p48ray.records import Record, canonical_json
from p48ray.stages.context import StageContext

ROWS_PER_HEAD_CALL = 4096  # tokens whose logits exist at once
WEIGHT_SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")
CompressedExperts = Callable[[int, int], ExpertWeights]


class EvaluationResult(Record):
    """Source and compressed model on the same held-out tokens. Losses and KL in nats a token."""

    num_tokens: int
    source_perplexity: float
    source_accuracy: float
    compressed_perplexity: float
    compressed_accuracy: float
    kl: float


def evaluation_digest(plan: RunPlan, settings: EvaluationConfig) -> str:
    """Identity of an evaluation: the plan, the held-out bytes and how they are drawn."""
    facts = settings.model_dump(mode="json", exclude={"documents", "baseline"}) | {
        "plan": plan.digest,
        "documents": digest_documents(settings.documents, "evaluation.documents"),
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def compressed_expert(index: CheckpointIndex, context: StageContext, layer: int, expert: int) -> ExpertWeights:
    """One expert of the written checkpoint, in either storage, decoded, float32."""
    storage = storage_of(index.config)
    stored = read_tensors(index.store, [index.tensors[name] for name in compressed_names(context, layer, expert, storage)])
    return decode_compressed(context, layer, expert, dense_tensors(stored) if storage == "sparse" else stored)


def compressed_names(context: StageContext, layer: int, expert: int, storage: Storage = "dense") -> list[str]:
    """Tensors that hold the weights of one compressed expert; those of a unit's shard are dense."""
    names = (context.layout.expert_linear_name(layer, expert, p) for p in PROJECTIONS)
    return [f"{name}.{stored}" for name in names for suffix in WEIGHT_SUFFIXES for stored in stored_suffixes(suffix, storage)]


def decode_compressed(context: StageContext, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> ExpertWeights:
    """One expert from its stored tensors, decoded, float32, on the context's device."""

    def decode(name: str) -> Tensor:
        packed, scale, divisor = (tensors[f"{name}.{suffix}"].to(context.device) for suffix in WEIGHT_SUFFIXES)
        return nvfp4.dequantize(e2m1.unpack(packed)[None], scale[None], divisor)[0]

    return ExpertWeights(*(decode(context.layout.expert_linear_name(layer, expert, p)) for p in ("gate_proj", "up_proj", "down_proj")))


def check_length(plan: RunPlan, settings: EvaluationConfig, longest: int | None) -> None:
    if longest is not None and settings.sequence_length > longest:
        raise ConfigError(
            f"evaluation.sequence_length: expected at most max_position_embeddings = {longest}, found {settings.sequence_length}"
        )


@torch.no_grad()
def evaluate_part(context: StageContext, compressed: CompressedExperts, token_ids_BS: Tensor, part: SequencePart) -> EvaluationPart:
    """Sums of loss, correct next tokens and KL(source || compressed) over some held-out sequences.

    Args: compressed: (layer, expert) -> that expert's weights after compression, decoded, in any float dtype.
          token_ids_BS: (sequences of the part, sequence_length + 1); the last column is only predicted.
    """
    decoder = context.decoder()
    inputs_BS, labels_BS = token_ids_BS[:, :-1], token_ids_BS[:, 1:].to(context.device).long()
    positions = decoder.positions(inputs_BS.shape[1])
    source_BSH = compressed_BSH = decoder.embed(inputs_BS)
    micro_batch = context.plan.config.calibration.sequences_per_micro_batch
    for number in range(context.plan.source.num_layers):
        layer = experts = None  # the layer below goes before this one is read
        experts = mixtures(context, decoder, compressed, number) if number in context.plan.source.moe_layers else None
        layer = decoder.layer(number, experts[0] if experts else None)
        source_BSH = run_layer(layer, source_BSH, positions, micro_batch)
        if experts:
            layer.mlp.experts = experts[1]
        compressed_BSH = run_layer(layer, compressed_BSH, positions, micro_batch)
    layer = experts = None
    sums = torch.zeros(5, dtype=torch.float64)
    head = decoder.head()
    rows = zip(
        *(x.flatten(0, 1).split(ROWS_PER_HEAD_CALL) for x in (source_BSH, compressed_BSH)),
        labels_BS.flatten().split(ROWS_PER_HEAD_CALL),
        strict=True,
    )
    for source_TH, compressed_TH, labels_T in rows:
        sums += compare_logits(head(source_TH), head(compressed_TH), labels_T).cpu()
    source_loss, source_correct, loss, correct, kl = sums.tolist()
    return EvaluationPart(
        plan_digest=context.plan.digest,
        part=part.part,
        num_tokens=labels_BS.numel(),
        source_loss=source_loss,
        source_correct=int(source_correct),
        compressed_loss=loss,
        compressed_correct=int(correct),
        kl=kl,
    )


def mixtures(context: StageContext, decoder: Decoder, compressed: CompressedExperts, number: int) -> tuple[RoutedExperts, RoutedExperts]:
    """The source's experts as they are, and the compressed ones under W4A4."""
    count, scales = context.layout.num_experts, context.layer_scales(number)
    seen = activation_scales(context.plan.config, scales.gate_up, scales.down)

    def smaller(expert: int) -> ExpertWeights:
        return ExpertWeights(*(w.to(decoder.dtype) for w in compressed(number, expert)))

    return RoutedExperts(count, layer_experts(decoder, number)), RoutedExperts(count, smaller, seen)


def activation_scales(config: RunConfig, gate_up: float, down: float) -> ActivationScales | None:
    """How the compressed experts' inputs are quantized under evaluation; None for original activations."""
    settings = config.evaluation
    if settings is not None and settings.activations == "original":
        return None
    group = settings.activation_group if settings is not None and settings.activation_group else config.compression.activation_group
    return ActivationScales(gate_up, down, group)


def compare_logits(source_TV: Tensor, compressed_TV: Tensor, labels_T: Tensor) -> Tensor:
    """(source loss, source correct, loss, correct, KL) summed over tokens, float64."""
    p_TV, q_TV = F.log_softmax(source_TV.float(), -1), F.log_softmax(compressed_TV.float(), -1)
    kl = F.kl_div(q_TV, p_TV, reduction="sum", log_target=True)
    facts = []
    for logs_TV in (p_TV, q_TV):
        facts += [F.nll_loss(logs_TV, labels_T, reduction="sum"), (logs_TV.argmax(-1) == labels_T).sum()]
    return torch.stack([f.double() for f in (*facts, kl)])


def combine(parts: list[EvaluationPart]) -> EvaluationResult:
    """Parts in order -> perplexities, accuracies and mean KL."""
    tokens = sum(p.num_tokens for p in parts)
    return EvaluationResult(
        num_tokens=tokens,
        source_perplexity=math.exp(sum(p.source_loss for p in parts) / tokens),
        source_accuracy=sum(p.source_correct for p in parts) / tokens,
        compressed_perplexity=math.exp(sum(p.compressed_loss for p in parts) / tokens),
        compressed_accuracy=sum(p.compressed_correct for p in parts) / tokens,
        kl=sum(p.kl for p in parts) / tokens,
    )
