"""Evaluate: held-out text through the source and through the finished checkpoint, side by side, one
layer at a time.

The compressed model's experts are decoded from the written files and their inputs quantized to
NVFP4 as the server does (W4A4 emulation, with the scales that the units put into the files);
everything else is the same bytes in both. So the difference is what a server
of the checkpoint would lose, kernel rounding apart.

Legend: N held-out sequences, B those of a part, S positions, H hidden size, T tokens whose logits
exist at once, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.config import EvaluationConfig
from p48ray.errors import ConfigError, NumericsError
from p48ray.run import run_root
from p48ray.run.checked import load_each, load_evaluation_part
from p48ray.run.manifest import CompressedSums, EvaluationPart, UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import RunPlan, SequencePart, cut_parts
from p48ray.run.records import Record, canonical_json
from p48ray.run.scale_counts import LayerScaleCounts
from p48ray.stages.compressed_experts import CompressedExperts, finished_experts
from p48ray.stages.side_by_side import (
    activation_groups,
    mixtures,
    sees_both_groups,
    through_layers,
)
from p48ray.stages.tasks import Task
from p48ray.texts.documents import digest_documents
from p48ray.unit.context import StageContext

TOKENS_PER_HEAD_CALL = 4096  # tokens whose logits exist at once


class CompressedQuality(Record):
    """A compressed model on held-out tokens. KL in nats a token."""

    perplexity: float
    accuracy: float
    kl: float


class EvaluationResult(Record):
    """Source and compressed model on the same held-out tokens. KL in nats a token.

    in_groups_of_32: the same checkpoint as kernels of paired-4:8 run it (see `sees_both_groups`).
    activation_scales: by layer, as served.
    """

    num_tokens: int
    source_perplexity: float
    source_accuracy: float
    compressed_perplexity: float
    compressed_accuracy: float
    kl: float
    in_groups_of_32: CompressedQuality | None = None
    activation_scales: tuple[LayerScaleCounts, ...] = ()


def evaluation_digest(plan: RunPlan, settings: EvaluationConfig) -> str:
    """Identity of an evaluation: the plan, the held-out bytes and how they are drawn."""
    facts = settings.model_dump(mode="json", exclude={"documents", "baseline", "greedy"}) | {
        "plan": plan.digest,
        "documents": digest_documents(settings.documents, "evaluation.documents"),
    }
    if sees_both_groups(plan.config):
        facts["groups"] = [16, 32]
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def check_length(plan: RunPlan, settings: EvaluationConfig, longest: int | None) -> None:
    if longest is not None and settings.sequence_length > longest:
        raise ConfigError(
            f"evaluation.sequence_length: expected at most max_position_embeddings = {longest},"
            f" found {settings.sequence_length}"
        )


@torch.no_grad()
def evaluate_part(
    context: StageContext, compressed: CompressedExperts, token_ids_BS: Tensor, part: SequencePart
) -> EvaluationPart:
    """Sums of loss, correct next tokens and KL(source || compressed) over some held-out sequences.

    Args:
        context: of the run.
        compressed: (layer, expert) -> that expert's weights after compression, decoded, in any
            float dtype.
        token_ids_BS: (sequences of the part, sequence_length + 1); the last column is only
            predicted.
        part: that the sums are recorded for.
    """
    decoder = context.decoder()
    inputs_BS, labels_BS = token_ids_BS[:, :-1], token_ids_BS[:, 1:].to(context.device).long()
    counts: list[LayerScaleCounts] = []
    streams = through_layers(
        context,
        decoder,
        inputs_BS,
        1 + len(activation_groups(context.plan.config)),
        lambda number: mixtures(context, decoder, compressed, number, counts),
    )
    sums = torch.zeros(2 + 3 * (len(streams) - 1), dtype=torch.float64)
    head = decoder.head()
    rows = zip(
        *(x.flatten(0, 1).split(TOKENS_PER_HEAD_CALL) for x in streams),
        labels_BS.flatten().split(TOKENS_PER_HEAD_CALL),
        strict=True,
    )
    for *found, labels_T in rows:
        sums += compare_logits(*(head(x_TH) for x_TH in found), labels_T=labels_T).cpu()
    check_sums(part, sums.tolist())
    source_loss, source_correct, loss, correct, kl, *other = sums.tolist()
    return EvaluationPart(
        plan_digest=context.plan.digest,
        evaluation="",  # whoever records it says of which
        part=part.part,
        num_tokens=labels_BS.numel(),
        source_loss=source_loss,
        source_correct=int(source_correct),
        compressed_loss=loss,
        compressed_correct=int(correct),
        kl=kl,
        in_groups_of_32=(
            CompressedSums(loss=other[0], correct=int(other[1]), kl=other[2]) if other else None
        ),
        activation_scales=tuple(counts),
    )


SUMS = ("the source's loss", "", "the compressed model's loss", "", "KL")
GROUPS_OF_32 = ("its loss with activations in groups of 32", "", "its KL with these")


def check_sums(part: SequencePart, sums: Sequence[float]) -> None:
    """Raises: NumericsError for a sum that is not finite, before anything is written of the
    part."""
    for name, value in zip((*SUMS, *GROUPS_OF_32), sums, strict=False):
        if math.isfinite(value):
            continue
        last = part.first_sequence + part.num_sequences - 1
        advice = "calibration.compute_dtype may be too narrow for this model (float32 is not)"
        raise NumericsError(
            f"evaluation, part {part.part} (held-out sequences {part.first_sequence} to {last}):"
            f" {name}: expected a finite sum, found {value}; nothing was written of it. Weights of"
            f" the source are finite by now, so {advice}; or evaluation.documents has a text that"
            " the model itself has no number for"
        )


def compare_logits(source_TV: Tensor, *compressed_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Summed over tokens, float64: the source's loss and correct tokens, then loss, correct tokens
    and KL from the source for each of the others."""
    p_TV = F.log_softmax(source_TV.float(), -1)
    sums = [F.nll_loss(p_TV, labels_T, reduction="sum"), (p_TV.argmax(-1) == labels_T).sum()]
    for logits_TV in compressed_TV:
        q_TV = F.log_softmax(logits_TV.float(), -1)
        sums += [F.nll_loss(q_TV, labels_T, reduction="sum"), (q_TV.argmax(-1) == labels_T).sum()]
        sums.append(F.kl_div(q_TV, p_TV, reduction="sum", log_target=True))
    return torch.stack([value.double() for value in sums])


def combine_parts(parts: list[EvaluationPart]) -> EvaluationResult:
    """Parts in order -> perplexities, accuracies and mean KL."""
    tokens = sum(p.num_tokens for p in parts)
    others = [p.in_groups_of_32 for p in parts if p.in_groups_of_32 is not None]
    return EvaluationResult(
        num_tokens=tokens,
        source_perplexity=perplexity(sum(p.source_loss for p in parts) / tokens),
        source_accuracy=sum(p.source_correct for p in parts) / tokens,
        compressed_perplexity=perplexity(sum(p.compressed_loss for p in parts) / tokens),
        compressed_accuracy=sum(p.compressed_correct for p in parts) / tokens,
        kl=sum(p.kl for p in parts) / tokens,
        in_groups_of_32=(
            CompressedQuality(
                perplexity=perplexity(sum(o.loss for o in others) / tokens),
                accuracy=sum(o.correct for o in others) / tokens,
                kl=sum(o.kl for o in others) / tokens,
            )
            if len(others) == len(parts)
            else None
        ),
        activation_scales=summed_by_layer(c for p in parts for c in p.activation_scales),
    )


def summed_by_layer(counts: Iterable[LayerScaleCounts]) -> tuple[LayerScaleCounts, ...]:
    sums: dict[int, LayerScaleCounts] = {}
    for c in counts:
        before = sums.get(c.layer)
        sums[c.layer] = (
            c
            if before is None
            else LayerScaleCounts(
                layer=c.layer, gate_up=before.gate_up + c.gate_up, down=before.down + c.down
            )
        )
    return tuple(sums.values())


def perplexity(loss: float) -> float:
    """Of a mean loss in nats a token. Raises: NumericsError for one that no float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericsError(
            f"evaluation: expected a loss whose exponential is a number, found {loss:.4g} nats a"
            " token"
        ) from None


def held_out_parts(context: StageContext) -> tuple[str, tuple[SequencePart, ...]]:
    """(digest of what the figures depend on, parts of the held-out sequences); no parts where
    nothing is evaluated.

    The texts are looked at once: hours later, when all sums are there, they may be elsewhere.
    """
    settings = context.plan.config.evaluation
    if settings is None:
        return "", ()
    digest = context.known.get("evaluation")
    if digest is None:
        digest = context.known["evaluation"] = evaluation_digest(context.plan, settings)
    return digest, tuple(cut_parts(settings.num_sequences, settings.sequences_per_part))


def parts_to_evaluate(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    digest, parts = held_out_parts(context)
    held = {info.key for info in context.store.list(run_root.EVALUATION)}
    missing = [p for p in parts if run_root.evaluation_part(digest, p.part) not in held]
    return [Task(stage="evaluate", id=f"part-{p.part:04d}", item=(digest, p)) for p in missing]


def evaluation_markers(context: StageContext) -> list[str]:
    digest, parts = held_out_parts(context)
    return [run_root.evaluation_part(digest, p.part) for p in parts]


def evaluate_and_record(context: StageContext, item: tuple[str, SequencePart]) -> None:
    """Evaluate one part of the held-out sequences; the sums are the done-marker."""
    digest, part = item
    ids_NS = context.tokens(run_root.evaluation_tokens(digest), digest)
    ids_BS = ids_NS[part.first_sequence : part.first_sequence + part.num_sequences]
    sums = evaluate_part(context, finished_experts(context), ids_BS, part)
    record = sums.model_copy(update={"evaluation": digest})
    context.store.put(run_root.evaluation_part(digest, part.part), record.to_json())


def finish_evaluation(
    context: StageContext, shards: tuple[OutputShard, ...], units: Sequence[UnitManifest]
) -> EvaluationResult:
    digest, parts = held_out_parts(context)
    plan, store = context.plan, context.store
    return combine_parts(
        load_each(lambda p: load_evaluation_part(plan, store, digest, p.part), parts)
    )
