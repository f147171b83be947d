"""Evaluate: held-out text through the source and through the finished checkpoint, side by side, one
layer at a time.

The compressed model's experts are decoded from the written files and their inputs quantized to
NVFP4 as the server does (W4A4 emulation, with the scales that the units put into the files);
everything else is the same bytes in both. So the difference is what a server
of the checkpoint would lose, kernel rounding apart.

Legend: N held-out sequences, B those of a part, S positions, H hidden size, T tokens whose logits
exist at once.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p48ray.config import EvaluationConfig
from p48ray.errors import ConfigError, CorruptObjectError, NumericsError
from p48ray.run import run_root
from p48ray.run.checked import check_found, load_each, load_evaluation_part, load_tokens_manifest
from p48ray.run.manifest import EvaluationCell, EvaluationPart, TokenSums, UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import RunPlan, SequencePart, cut_parts
from p48ray.run.records import Record, canonical_json
from p48ray.run.scale_counts import LayerScaleCounts, summed_by_layer
from p48ray.stages.cells import CellSums, cells_of, compare_logits, stretch_ends
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
OTHER_DOMAIN = "other"
"""Of the sources without a name, in a mix where some have one."""


class CompressedQuality(Record):
    """A compressed model on held-out tokens. KL in nats a token."""

    perplexity: float
    accuracy: float
    kl: float


class TextQuality(Record):
    """Source and compressed model on the same held-out tokens. KL in nats a token.

    in_groups_of_32: the same checkpoint as kernels of paired-4:8 run it (see `sees_both_groups`).
    """

    num_tokens: int
    source_perplexity: float
    source_accuracy: float
    compressed_perplexity: float
    compressed_accuracy: float
    kl: float
    in_groups_of_32: CompressedQuality | None = None


class StretchQuality(TextQuality):
    """Of the tokens at some positions of their sequences, of which the first is 1."""

    first: int
    last: int


class DomainQuality(TextQuality):
    """Of the tokens of one domain; `stretches`: and by position."""

    name: str
    stretches: tuple[StretchQuality, ...]


class EvaluationResult(TextQuality):
    """Of all held-out tokens, by position, and by domain where sources have names.

    activation_scales: by layer, as served.
    """

    stretches: tuple[StretchQuality, ...] = ()
    domains: tuple[DomainQuality, ...] = ()
    activation_scales: tuple[LayerScaleCounts, ...] = ()


def evaluation_digest(plan: RunPlan, settings: EvaluationConfig) -> str:
    """Identity of an evaluation: the plan, the held-out bytes, how they are drawn and how sums are
    cut. Names of domains are not in it: sums are by source."""
    facts = settings.model_dump(mode="json", exclude={"documents", "baseline", "greedy"}) | {
        "plan": plan.digest,
        "documents": digest_documents(settings.documents, "evaluation.documents"),
        "stretches": stretch_ends(settings.sequence_length),
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
    context: StageContext,
    compressed: CompressedExperts,
    token_ids_BS: Tensor,
    documents_B: Sequence[int],
    part: SequencePart,
) -> EvaluationPart:
    """Sums of loss, correct next tokens and KL(source || compressed) over some held-out sequences,
    by source and position.

    Args:
        context: of the run.
        compressed: (layer, expert) -> that expert's weights after compression, decoded, in any
            float dtype.
        token_ids_BS: (sequences of the part, sequence_length + 1); the last column is only
            predicted.
        documents_B: of every sequence, the place of its source in evaluation.documents.
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
    length = inputs_BS.shape[1]
    cells, head = CellSums(), decoder.head()
    rows = zip(
        *(x.flatten(0, 1).split(TOKENS_PER_HEAD_CALL) for x in streams),
        labels_BS.flatten().split(TOKENS_PER_HEAD_CALL),
        cells_of(documents_B, length).flatten().split(TOKENS_PER_HEAD_CALL),
        strict=True,
    )
    for *found, labels_T, cells_T in rows:
        cells.add(compare_logits(*(head(x_TH) for x_TH in found), labels_T=labels_T), cells_T)
    return EvaluationPart(
        plan_digest=context.plan.digest,
        evaluation="",  # whoever records it says of which
        part=part.part,
        stretch_ends=stretch_ends(length),
        cells=cells.records(part, length),
        activation_scales=tuple(counts),
    )


def combine_parts(
    parts: Sequence[EvaluationPart], names: Sequence[str | None] = ()
) -> EvaluationResult:
    """Perplexities, accuracies and mean KL of all tokens, by position and by domain.

    Args:
        parts: of one evaluation, in any order.
        names: of the sources of the mix, in its order; without any there are no domains.
    """
    ends, cells = parts[0].stretch_ends, [c for p in parts for c in p.cells]
    domains = dict.fromkeys(name for name in names if name)
    if domains and not all(names):
        domains[OTHER_DOMAIN] = None
    own = {d: [c for c in cells if (names[c.document] or OTHER_DOMAIN) == d] for d in domains}
    return EvaluationResult(
        **qualities(cells),
        stretches=by_stretch(cells, ends),
        domains=tuple(
            DomainQuality(**qualities(some), name=name, stretches=by_stretch(some, ends))
            for name, some in own.items()
        ),
        activation_scales=summed_by_layer(c for p in parts for c in p.activation_scales),
    )


def by_stretch(cells: Sequence[EvaluationCell], ends: Sequence[int]) -> tuple[StretchQuality, ...]:
    """From the beginning of the sequences on. `ends`: as EvaluationPart has them."""
    firsts = (1, *(end + 1 for end in ends[:-1]))
    return tuple(
        StretchQuality(
            **qualities([c for c in cells if c.stretch == n]), first=firsts[n], last=ends[n]
        )
        for n in range(len(ends))
    )


def qualities(sums: Sequence[TokenSums]) -> dict[str, Any]:
    """The fields of TextQuality, of all tokens together. Sums are exact, so that their order does
    not matter."""
    tokens = sum(s.num_tokens for s in sums)
    others = [s.in_groups_of_32 for s in sums if s.in_groups_of_32 is not None]
    return {
        "num_tokens": tokens,
        "source_perplexity": perplexity(math.fsum(s.source_loss for s in sums) / tokens),
        "source_accuracy": sum(s.source_correct for s in sums) / tokens,
        "compressed_perplexity": perplexity(math.fsum(s.compressed_loss for s in sums) / tokens),
        "compressed_accuracy": sum(s.compressed_correct for s in sums) / tokens,
        "kl": math.fsum(s.kl for s in sums) / tokens,
        "in_groups_of_32": CompressedQuality(
            perplexity=perplexity(math.fsum(o.loss for o in others) / tokens),
            accuracy=sum(o.correct for o in others) / tokens,
            kl=math.fsum(o.kl for o in others) / tokens,
        )
        if len(others) == len(sums)
        else None,
    }


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


def held_out_sequences(context: StageContext, digest: str) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids (N, S + 1), and of every sequence the place of its source in evaluation.documents.

    Raises: CorruptObjectError when they are not what was written: the driver packs the texts again.
    """
    key = run_root.evaluation_tokens(digest)
    ids_NS = context.tokens(key, digest)
    origins = load_tokens_manifest(context.store, key, digest).origins
    sources = num_sources(context.plan)
    if len(origins) != len(ids_NS) or max(origins) >= sources:
        raise CorruptObjectError(
            f"{context.store.uri}/{run_root.manifest_of(key)}: origins: expected one for each of"
            f" {len(ids_NS)} sequences, below {sources}, found {len(origins)} up to"
            f" {max(origins, default=0)}",
            run_root.manifest_of(key),
            key,
        )
    return ids_NS, origins


def num_sources(plan: RunPlan) -> int:
    """Of held-out texts."""
    settings = plan.config.evaluation
    return len(settings.documents) if settings else 0


def evaluate_and_record(context: StageContext, item: tuple[str, SequencePart]) -> None:
    """Evaluate one part of the held-out sequences; the sums are the done-marker."""
    digest, part = item
    ids_NS, documents_N = held_out_sequences(context, digest)
    own = slice(part.first_sequence, part.first_sequence + part.num_sequences)
    compressed = finished_experts(context)
    sums = evaluate_part(context, compressed, ids_NS[own], documents_N[own], part)
    record = sums.model_copy(update={"evaluation": digest})
    context.store.put(run_root.evaluation_part(digest, part.part), record.to_json())


def finish_evaluation(
    context: StageContext, shards: tuple[OutputShard, ...], units: Sequence[UnitManifest]
) -> EvaluationResult:
    digest, parts = held_out_parts(context)
    plan, store, settings = context.plan, context.store, context.plan.config.evaluation

    def load(part: SequencePart) -> EvaluationPart:
        found = load_evaluation_part(plan, store, digest, part.part)
        key = run_root.evaluation_part(digest, part.part)
        sequences = sum(cell.num_tokens for cell in found.cells) / found.stretch_ends[-1]
        unknown = {c.document for c in found.cells if c.document >= num_sources(plan)}
        check_found(store, key, "sequences", part.num_sequences, sequences)
        check_found(store, key, "sources that are not in the mix", set(), unknown)
        return found

    return combine_parts(
        load_each(load, parts),
        [d.name for d in settings.documents] if settings else [],
    )
