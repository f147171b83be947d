"""Greedy: how many tokens the finished checkpoint follows its source before the first different
one, where both always write the most likely token. A small stand-in for tests of long generation.

Only as long as the compressed model follows is it compared, so only the source has to write: it
continues every prompt, then the compressed model reads prompt and continuation once (W4A4 emulated,
as in evaluate), and the first position where it would have written another token is the length.

The source does not fit on a device, so it does not write token by token. A pass over its layers
looks at a whole draft at once: a token is right when all before it are and it is the most likely
one there, and the first that is wrong is replaced by that. So a pass settles at least one token
more, most tokens after it are the next pass's draft, and what comes out is the greedy continuation
(Jacobi decoding: Santilli et al. 2023, "Accelerating Transformer Inference for Translation via
Parallel Decoding"). The first draft is what the held-out text itself goes on with.

A part keeps the shape of its batch through all passes, finished prompts included, and what is
settled is not looked at again: the result is the same on any number of workers and after any loss
of them. Passes of another shape (a server's, or parts of another size) may break near ties
otherwise. Of equal logits the lowest token wins. An end of text is a token like any other.

Legend: N held-out sequences, B prompts of a part, P tokens of a prompt, G tokens of a continuation,
S positions of what is read, H hidden size, T tokens whose logits exist at once, V vocabulary.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from p48ray.config.greedy import GreedyConfig
from p48ray.errors import NumericsError
from p48ray.model.decoder import Decoder
from p48ray.run import run_root
from p48ray.run.checked import check_found, load_each
from p48ray.run.greedy_records import (
    Continuations,
    ContinuedPrompt,
    FollowedPrompt,
    GreedyPart,
    load_continuations,
    load_greedy_part,
)
from p48ray.run.manifest import UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import RunPlan, SequencePart, cut_parts
from p48ray.run.records import Record, canonical_json
from p48ray.stages.compressed_experts import CompressedExperts, finished_experts
from p48ray.stages.evaluate import TOKENS_PER_HEAD_CALL, held_out_parts
from p48ray.stages.side_by_side import (
    Views,
    compressed_mixtures,
    source_mixture,
    through_layers,
)
from p48ray.stages.tasks import Task
from p48ray.store.base import Store
from p48ray.unit.context import StageContext

log = logging.getLogger("p48ray.progress")

REACHED_BY = 90
"""Per cent of the prompts that reach the shorter of the two lengths that are reported."""

GreedyItem = tuple[str, str, SequencePart]
"""Digests of the agreement and of the evaluation whose texts it uses, and a part of the prompts."""


class GreedyAgreement(Record):
    """How many tokens the compressed model follows its source. `tokens`: of a continuation; a
    length of so many is a lower bound.

    median, reached_by_90: the length that half of the prompts reach, and that 90 % do.
    never_differed: share of the prompts. margins: of the source's logits between its token and the
    next one, nats: at the first different token (None: there is none), and over all tokens. passes:
    over all of the source's layers, of all parts.
    """

    num_prompts: int
    prompt_tokens: int
    tokens: int
    median: int
    reached_by_90: int
    never_differed: float
    margin_at_difference: float | None
    mean_margin: float
    num_parts: int
    passes: int


def wants_agreement(plan: RunPlan) -> bool:
    """A pilot has no compressed model, only layers of one."""
    return greedy_settings(plan) is not None and not plan.is_pilot


def greedy_settings(plan: RunPlan) -> GreedyConfig | None:
    evaluation = plan.config.evaluation
    return evaluation.greedy if evaluation is not None else None


def agreement_parts(context: StageContext) -> tuple[str, str, tuple[SequencePart, ...]]:
    """(digest of what the figures depend on, that of the evaluation, parts of the prompts)."""
    settings, (evaluation, _) = greedy_settings(context.plan), held_out_parts(context)
    assert settings is not None
    facts = {"evaluation": evaluation} | settings.model_dump(mode="json")
    digest = hashlib.sha256(canonical_json(facts)).hexdigest()[:16]
    return digest, evaluation, tuple(cut_parts(settings.prompts, settings.prompts_per_part))


def agreements_to_find(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    digest, evaluation, parts = agreement_parts(context)
    held = {info.key for info in context.store.list(run_root.GREEDY)}
    return [
        Task(stage="greedy", id=f"part-{p.part:04d}", item=(digest, evaluation, p))
        for p in parts
        if run_root.greedy_part(digest, p.part) not in held
    ]


def agreement_markers(context: StageContext) -> list[str]:
    digest, _, parts = agreement_parts(context)
    return [run_root.greedy_part(digest, p.part) for p in parts]


def follow_and_record(context: StageContext, item: GreedyItem) -> None:
    """The source's continuations of some prompts, then how far the checkpoint follows them; the
    record is the done-marker."""
    digest, evaluation, part = item
    settings = greedy_settings(context.plan)
    assert settings is not None
    ids_NS = context.tokens(run_root.evaluation_tokens(evaluation), evaluation)
    text_BS = ids_NS[part.first_sequence : part.first_sequence + part.num_sequences]
    text_BS = text_BS[:, : settings.prompt_tokens + settings.tokens].long()
    found = continue_prompts(context, text_BS, settings.prompt_tokens, part.part)
    record = GreedyPart(
        plan_digest=context.plan.digest,
        agreement=digest,
        part=part.part,
        tokens=settings.tokens,
        passes=found.passes,
        prompts=followed_prompts(
            context, finished_experts(context), text_BS[:, : settings.prompt_tokens], found
        ),
    )
    context.store.put(run_root.greedy_part(digest, part.part), record.to_json())


@torch.no_grad()
def continue_prompts(
    context: StageContext, text_BS: Tensor, prompt_tokens: int, part: int
) -> Continuations:
    """What the source writes after some prompts, from where an earlier attempt left off: its record
    is written anew after each pass.

    Args:
        context: of the run.
        text_BS: (B, P + G) held-out texts, the prompts and what they themselves go on with.
        prompt_tokens: P.
        part: its number, for the log.
    Raises: NumericsError for logits that are not finite.
    """
    prompts_BP, draft_BG = text_BS.tensor_split([prompt_tokens], 1)
    digest = continuations_digest(context, text_BS, prompt_tokens)
    found = stored_continuations(context, digest, draft_BG) or Continuations(
        digest=digest,
        passes=0,
        prompts=tuple(ContinuedPrompt(tokens=tuple(ids), margins=()) for ids in draft_BG.tolist()),
    )
    decoder, length = context.decoder(), draft_BG.shape[1]
    while any(p.settled < length for p in found.prompts):
        choices_BG, margins_BG = most_likely(
            context,
            decoder,
            prompts_BP,
            found,
            lambda number: source_mixture(context, decoder, number),
        )
        each = zip(found.prompts, choices_BG.tolist(), margins_BG.tolist(), strict=True)
        found = Continuations(
            digest=digest,
            passes=found.passes + 1,
            prompts=tuple(settle(*prompt) for prompt in each),
        )
        context.store.put(run_root.continuations(digest), found.to_json())
        settled = [p.settled for p in found.prompts]
        log.info(
            "greedy    part %d, pass %d of at most %d over the source: %d/%d tokens, %d/%d prompts",
            *(part, found.passes, length),
            *(sum(settled), draft_BG.numel(), settled.count(length), len(settled)),
        )
    return found


def stored_continuations(
    context: StageContext, digest: str, draft_BG: Tensor
) -> Continuations | None:
    """What an earlier attempt has left. Raises: CorruptObjectError for a record of other prompts.

    Args:
        context, digest: of the run, and of the continuations.
        draft_BG: the first draft, of the same shape.
    """
    found = load_continuations(context.store, digest)
    if found is not None:
        key, vocab_size = run_root.continuations(digest), context.layout.text_config["vocab_size"]
        length = draft_BG.shape[1]
        lengths = [len(p.tokens) for p in found.prompts]
        check_found(context.store, key, "tokens of each prompt", [length] * len(draft_BG), lengths)
        wrong = [
            p.tokens
            for p in found.prompts
            if p.settled > length or not all(0 <= t < vocab_size for t in p.tokens)
        ]
        check_found(context.store, key, "prompts with other tokens or margins", [], wrong)
    return found


def settle(
    prompt: ContinuedPrompt, choices: Sequence[int], margins: Sequence[float]
) -> ContinuedPrompt:
    """After a pass over a draft: what it settles, and the next draft.

    Args:
        prompt: with the draft.
        choices: the most likely token at each of its places.
        margins: of these.
    """
    first = right = prompt.settled
    while right < len(choices) and prompt.tokens[right] == choices[right]:
        right += 1
    settled = min(right + 1, len(choices))  # what is wrong first is right now
    return ContinuedPrompt(
        tokens=(*prompt.tokens[:first], *choices[first:]),
        margins=(*prompt.margins, *margins[first:settled]),
    )


@torch.no_grad()
def followed_prompts(
    context: StageContext,
    compressed: CompressedExperts,
    prompts_BP: Tensor,
    continuations: Continuations,
) -> tuple[FollowedPrompt, ...]:
    """How far the compressed model follows what its source has written.

    Args:
        context: of the run.
        compressed: (layer, expert) -> that expert's weights after compression.
        prompts_BP: the prompts.
        continuations: of them, all settled.
    """
    decoder = context.decoder()
    choices_BG, _ = most_likely(
        context,
        decoder,
        prompts_BP,
        continuations,
        lambda number: nullcontext(
            compressed_mixtures(context, decoder, compressed, number, [])[:1]
        ),
    )
    found = []
    for prompt, choices in zip(continuations.prompts, choices_BG.tolist(), strict=True):
        length = len(prompt.tokens)
        places = (i for i in range(length) if choices[i] != prompt.tokens[i])
        followed = next(places, length)
        found.append(
            FollowedPrompt(
                followed=followed,
                margin=prompt.margins[followed] if followed < length else None,
                mean_margin=math.fsum(prompt.margins) / length,
            )
        )
    return tuple(found)


def most_likely(
    context: StageContext,
    decoder: Decoder,
    prompts_BP: Tensor,
    continuations: Continuations,
    views: Views,
) -> tuple[Tensor, Tensor]:
    """The token that a model would write at each place of the continuations, given all before it,
    and how far its logit lies above the next one's: (B, G) each, on the CPU.

    Args:
        context: of the run.
        decoder: of the source.
        prompts_BP: the prompts.
        continuations: of them, drafts included.
        views: as through_layers takes them, of one model.
    Raises: NumericsError for logits that are not finite.
    """
    written_BG = torch.tensor([p.tokens for p in continuations.prompts])
    read_BS = torch.cat([prompts_BP, written_BG[:, :-1]], 1)
    (x_BSH,) = through_layers(context, decoder, read_BS, 1, views)
    head, choices, margins = decoder.head(), [], []
    for x_TH in x_BSH[:, prompts_BP.shape[1] - 1 :].flatten(0, 1).split(TOKENS_PER_HEAD_CALL):
        logits_TV = head(x_TH).float()
        choices.append(logits_TV.argmax(1).cpu())  # of equal ones the first
        first, second = logits_TV.topk(2, 1).values.unbind(1)
        margins.append((first - second).cpu())
    if not (margin := torch.cat(margins)).isfinite().all():
        raise NumericsError(
            "greedy: expected finite logits, found others; calibration.compute_dtype may be too"
            " narrow for this model (float32 is not)"
        )
    return torch.cat(choices).view_as(written_BG), margin.view_as(written_BG)


def continuations_digest(context: StageContext, text_BS: Tensor, prompt_tokens: int) -> str:
    """Identity of continuations: the source, what it reads and in which arithmetic. The baseline's
    are the same."""
    plan, c = context.plan, context.plan.config.calibration
    facts = {
        "numerics": plan.numerics_version,
        "source": plan.source.fingerprint,
        "shape": list(text_BS.shape),
        "text": hashlib.sha256(text_BS.contiguous().numpy().tobytes()).hexdigest(),
        "prompt_tokens": prompt_tokens,
        "compute_dtype": c.compute_dtype,
        "micro_batch": c.sequences_per_micro_batch,
        "threads": plan.config.run.threads_per_worker,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def share_continuations(store: Store) -> None:
    """Give the one-shot baseline what the source has written for this run, so that it is not
    written again.

    Args: store: the run root.
    """
    for info in store.list(run_root.CONTINUATIONS):
        store.put(f"{run_root.BASELINE}{info.key}", store.get(info.key))


def finish_agreement(
    context: StageContext, shards: tuple[OutputShard, ...], units: Sequence[UnitManifest]
) -> GreedyAgreement:
    digest, _, parts = agreement_parts(context)
    plan, store = context.plan, context.store
    settings = greedy_settings(plan)
    assert settings is not None

    def load(part: SequencePart) -> GreedyPart:
        found = load_greedy_part(plan, store, digest, part.part)
        key = run_root.greedy_part(digest, part.part)
        check_found(store, key, "prompts", part.num_sequences, len(found.prompts))
        check_found(store, key, "tokens", settings.tokens, found.tokens)
        return found

    return combine_agreements(load_each(load, parts), settings.prompt_tokens)


def combine_agreements(parts: Sequence[GreedyPart], prompt_tokens: int) -> GreedyAgreement:
    """Parts, and the length of their prompts -> figures over all prompts."""
    prompts = [p for part in parts for p in part.prompts]
    margins = [p.margin for p in prompts if p.margin is not None]
    return GreedyAgreement(
        num_prompts=len(prompts),
        prompt_tokens=prompt_tokens,
        tokens=parts[0].tokens,
        median=reached(prompts, 50),
        reached_by_90=reached(prompts, REACHED_BY),
        never_differed=1 - len(margins) / len(prompts),
        margin_at_difference=math.fsum(margins) / len(margins) if margins else None,
        mean_margin=math.fsum(p.mean_margin for p in prompts) / len(prompts),
        num_parts=len(parts),
        passes=sum(part.passes for part in parts),
    )


def reached(prompts: Sequence[FollowedPrompt], percent: int) -> int:
    """The greatest length that at least so many per cent of the prompts reach. Lengths that were
    cut off at the end count as what they are at least, which changes no length below."""
    lengths = sorted((p.followed for p in prompts), reverse=True)
    return lengths[-(-percent * len(lengths) // 100) - 1]
