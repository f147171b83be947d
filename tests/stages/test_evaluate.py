"""Held-out text through both models, against whole models run by transformers, and what makes an
evaluation another one."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from p48ray.checkpoint.index import open_checkpoint
from p48ray.errors import ConfigError, NumericsError, StageFailedError
from p48ray.model.decoder import Decoder
from p48ray.model.experts import RoutedExperts
from p48ray.report.report import Report
from p48ray.run import arrow, run_root
from p48ray.run.manifest import (
    CompressedSums,
    EvaluationCell,
    EvaluationPart,
    LayerScales,
    TokenSums,
)
from p48ray.run.plan import SequencePart
from p48ray.run.scale_counts import LayerScaleCounts
from p48ray.stages import evaluate
from p48ray.stages.compressed_experts import compressed_expert
from p48ray.stages.evaluate import (
    CompressedExperts,
    CompressedQuality,
    DomainQuality,
    EvaluationResult,
    StretchQuality,
    combine_parts,
    evaluate_part,
    evaluation_digest,
)
from p48ray.stages.prepare import prepare
from p48ray.stages.table import STAGES
from p48ray.store import LocalStore
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY
from tests.reference import whole_model
from tests.reference.formats import e4m3
from tests.stages.slow_nvfp4 import decode_weights, quantize_tokens
from tests.stages.small_run import SmallRun, configure, run_locally

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def digest(finished: SmallRun) -> str:
    settings = finished.prepared.plan.config.evaluation
    assert settings is not None
    return evaluation_digest(finished.prepared.plan, settings)


@pytest.fixture(scope="module")
def held_out(finished: SmallRun, digest: str) -> Tensor:
    """(3, 65) token ids as the run drew them."""
    return arrow.decode(finished.prepared.store.get(run_root.evaluation_tokens(digest)), "tokens")[
        "token_ids"
    ].long()


@pytest.fixture(scope="module")
def checkpoint(finished: SmallRun) -> CompressedExperts:
    return partial(
        compressed_expert, open_checkpoint(LocalStore(finished.checkpoint)), finished.context
    )


def evaluate_all(
    context: StageContext, compressed: CompressedExperts, ids_BS: Tensor
) -> EvaluationPart:
    """Sequences of one source as one part."""
    part = SequencePart(part=0, first_sequence=0, num_sequences=len(ids_BS))
    return evaluate_part(context, compressed, ids_BS, [0] * len(ids_BS), part)


def total(*parts: EvaluationPart) -> TokenSums:
    """Of all cells, in plain sums."""
    cells = [c for p in parts for c in p.cells]
    others = [c.in_groups_of_32 for c in cells if c.in_groups_of_32 is not None]
    fields = [name for name in TokenSums.model_fields if name != "in_groups_of_32"]
    return TokenSums(
        **{name: sum(getattr(c, name) for c in cells) for name in fields},
        in_groups_of_32=CompressedSums(
            loss=sum(o.loss for o in others),
            correct=sum(o.correct for o in others),
            kl=sum(o.kl for o in others),
        )
        if others
        else None,
    )


@pytest.fixture(scope="module")
def source_logits(held_out: Tensor) -> Tensor:
    """(3 * 64, V) by the whole source model."""
    return whole_model.run_and_record(whole_model.load(TINY), held_out[:, :-1])[0].flatten(0, 1)


def w4a4_forward(
    weights: list[dict[str, Tensor]], gate_up_scale: float, down_scale: float, group: int
) -> Callable[..., Tensor]:
    """A mixture written from the definition: quantize x, SwiGLU, quantize h, project down, weigh,
    add."""

    def forward(hidden_TH: Tensor, expert_ids_TK: Tensor, router_weights_TK: Tensor) -> Tensor:
        out_TH = torch.zeros_like(hidden_TH)
        x_TH = quantize_tokens(hidden_TH, gate_up_scale, group).float()
        for token in range(len(hidden_TH)):
            for expert, weight in zip(
                expert_ids_TK[token].tolist(), router_weights_TK[token], strict=True
            ):
                w = weights[expert]
                h_1F = F.silu(x_TH[token : token + 1] @ w["gate_proj"].T) * (
                    x_TH[token : token + 1] @ w["up_proj"].T
                )
                out_TH[token] += (
                    weight
                    * (quantize_tokens(h_1F, down_scale, group).float() @ w["down_proj"].T)[0]
                )
        return out_TH

    return forward


def compressed_model(run: SmallRun, group: int = 16) -> PreTrainedModel:
    """The whole model by transformers with the stored experts in it, scales from the checkpoint's
    own input_global_scale."""
    model, tensors = whole_model.load(TINY), whole_model.read_all(run.checkpoint)
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        stem = f"language_model.model.layers.{number}.mlp.experts"
        weights = [
            {
                p: decode_weights({s: tensors[f"{stem}.{e}.{p}.{s}"] for s in suffixes}).float()
                for p in PROJECTIONS
            }
            for e in range(16)
        ]
        gate_up, down = (
            tensors[f"{stem}.0.{p}.input_global_scale"].item() for p in ("gate_proj", "down_proj")
        )
        layer.mlp.experts.forward = w4a4_forward(weights, gate_up, down, group)
    return model


def compressed_logits(run: SmallRun, ids_BS: Tensor, group: int = 16) -> Tensor:
    with torch.no_grad():
        found: Tensor = compressed_model(run, group)(input_ids=ids_BS, use_cache=False).logits
    return found.flatten(0, 1)


def facts(logits_TV: Tensor, labels_T: Tensor) -> tuple[float, int]:
    """(summed cross-entropy, correct next tokens)."""
    logits_TV = logits_TV.double()
    loss = (logits_TV.logsumexp(1) - logits_TV[torch.arange(len(labels_T)), labels_T]).sum().item()
    return loss, int((logits_TV.argmax(1) == labels_T).sum())


def test_source_stream_is_the_whole_source_model(
    finished: SmallRun, digest: str, held_out: Tensor, source_logits: Tensor
) -> None:
    """As the job stored it, part by part: perplexity to 1e-4, as many correct tokens."""
    store = finished.prepared.store
    parts = [EvaluationPart.load(store, run_root.evaluation_part(digest, p)) for p in range(2)]
    loss, correct = facts(source_logits, held_out[:, 1:].flatten())
    assert total(*parts).num_tokens == 3 * 64
    assert combine_parts(parts).source_perplexity == pytest.approx(math.exp(loss / 192), rel=1e-4)
    assert total(*parts).source_correct == correct


def test_source_against_itself_has_no_divergence_and_the_same_losses(
    finished: SmallRun,
    checkpoint: CompressedExperts,
    held_out: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = evaluate.mixtures

    @contextmanager
    def source_thrice(
        context: StageContext,
        decoder: Decoder,
        compressed: CompressedExperts,
        number: int,
        counts: list[LayerScaleCounts],
    ) -> Iterator[list[RoutedExperts]]:
        with real(context, decoder, compressed, number, counts) as (source, *others):
            yield [source] * (1 + len(others))

    monkeypatch.setattr(evaluate, "mixtures", source_thrice)
    found = total(evaluate_all(finished.context, checkpoint, held_out))
    assert found.kl == 0
    assert found.compressed_loss == found.source_loss > 0
    assert found.compressed_correct == found.source_correct > 0
    assert found.in_groups_of_32 == CompressedSums(
        loss=found.source_loss, correct=found.source_correct, kl=0
    )


@pytest.mark.parametrize("factor", [1.0, 64.0, 2.0**-9, 2.0**-13])
def test_groups_that_saturate_or_are_too_small_are_counted_as_served(
    finished: SmallRun,
    checkpoint: CompressedExperts,
    held_out: Tensor,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under the units' own scales and under others. The first mixture's inputs are the source's:
    what is below it is not compressed."""
    real = StageContext.stored_scales

    def others(self: StageContext, layer: int) -> tuple[float, float]:
        gate_up, down = real(self, layer)
        return factor * gate_up, factor * down

    monkeypatch.setattr(StageContext, "stored_scales", others)
    found = evaluate_all(finished.context, checkpoint, held_out)
    layers = finished.context.plan.layers
    assert [c.layer for c in found.activation_scales] == list(layers)
    _, seen = whole_model.run_and_record(whole_model.load(TINY), held_out[:, :-1])
    x_TH = seen[layers[0]].hidden_TH
    scale = others(finished.context, layers[0])[0]
    raw = [scale * a / 6 for a in x_TH.unflatten(1, (-1, 16)).abs().amax(-1).flatten().tolist()]
    rounded = [e4m3(min(r, 448.0)) for r in raw]
    counts = found.activation_scales[0].gate_up
    assert counts.groups == len(raw)
    expected = (
        sum(r > 448 for r in raw),
        sum(0 < r < 2**-6 for r in rounded),
        sum(r == 0 for r in rounded),
    )
    for name, want in zip(("saturated", "subnormal", "zero"), expected, strict=True):
        # the streamed model's sums are in another order than the whole one's
        assert abs(getattr(counts, name) - want) <= 0.002 * counts.groups, name
    for c in found.activation_scales:
        assert 0 < c.down.groups < c.gate_up.groups * 4
        assert c.down.saturated == 0 or factor == 64
        assert (c.down.subnormal + c.down.zero > 0.2 * c.down.groups) == (factor < 1)
    if factor == 1:
        assert expected == (0, 0, 0)
        assert combine_parts([found, found]).activation_scales[0].gate_up.groups == 2 * len(raw)


@pytest.mark.slow
@pytest.mark.parametrize("group", [16, 32])
def test_compressed_stream_is_the_whole_model_with_stored_experts_and_quantized_inputs(
    finished: SmallRun,
    checkpoint: CompressedExperts,
    held_out: Tensor,
    source_logits: Tensor,
    group: int,
) -> None:
    """Activations quantized by the test's own tables. A rounding tie that falls the other way moves
    a token's logits a little."""
    compression = finished.prepared.plan.config.compression.model_copy(
        update={"activation_group": group}
    )
    plan = finished.prepared.plan.model_copy(
        update={
            "config": finished.prepared.plan.config.model_copy(update={"compression": compression})
        }
    )
    context = StageContext(
        plan=plan,
        store=finished.prepared.store,
        source=finished.prepared.source,
        layout=finished.prepared.layout,
        device=torch.device("cpu"),
    )
    ids_BS, labels_T = held_out[:2], held_out[:2, 1:].flatten()
    found = total(evaluate_all(context, checkpoint, ids_BS))
    logits_TV = compressed_logits(finished, ids_BS[:, :-1], group)
    loss, correct = facts(logits_TV, labels_T)
    p_TV, q_TV = source_logits[:128].double().log_softmax(1), logits_TV.double().log_softmax(1)
    kl = (p_TV.exp() * (p_TV - q_TV)).sum().item()
    assert found.compressed_loss == pytest.approx(loss, rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert abs(found.compressed_correct - correct) <= 1
    assert found.kl / 128 > 0.05, "an experiment in which nothing was lost would prove nothing"
    if group == 32:
        assert found.in_groups_of_32 is None, "it is what is served"
        return
    assert found.in_groups_of_32 is not None
    logits_TV = compressed_logits(finished, ids_BS[:, :-1], 32)
    loss, _ = facts(logits_TV, labels_T)
    kl = (p_TV.exp() * (p_TV - logits_TV.double().log_softmax(1))).sum().item()
    assert found.in_groups_of_32.loss == pytest.approx(loss, rel=1e-4)
    assert found.in_groups_of_32.kl == pytest.approx(kl, rel=1e-3)
    assert found.in_groups_of_32.kl != pytest.approx(found.kl, rel=1e-3), (
        "the view should see something else"
    )


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("compression", {"sparsity": "none", "solver": "gptq"}),
        ("compression", {"scale_span": 16}),
        ("evaluation", {"activations": "original"}),
        ("evaluation", {"activation_group": 32}),
    ],
    ids=str,
)
def test_groups_of_32_are_looked_at_where_sparse_kernels_could_run(
    finished: SmallRun, section: str, changes: dict[str, object]
) -> None:
    plan = finished.prepared.plan
    assert evaluate.activation_groups(plan.config) == [16, 32]
    other = plan.config.model_copy(
        update={section: getattr(plan.config, section).model_copy(update=changes)}
    )
    assert len(evaluate.activation_groups(other)) == 1
    assert (
        finished.report.quality is not None and finished.report.quality.in_groups_of_32 is not None
    )


def test_evaluation_quantizes_with_the_scales_that_the_checkpoint_tells_servers(
    finished: SmallRun,
) -> None:
    tensors = whole_model.read_all(finished.checkpoint)
    for layer in finished.prepared.plan.source.moe_layers:
        scales = LayerScales.load(finished.prepared.store, run_root.layer_scales(layer))
        for expert in range(16):
            stem = f"language_model.model.layers.{layer}.mlp.experts.{expert}"
            found = [tensors[f"{stem}.{p}.input_global_scale"].item() for p in PROJECTIONS]
            assert found == [
                pytest.approx(s, rel=1e-7) for s in (scales.gate_up, scales.gate_up, scales.down)
            ]


def test_labels_are_the_next_tokens_and_the_last_column_is_only_predicted(
    finished: SmallRun, checkpoint: CompressedExperts, held_out: Tensor
) -> None:
    changed = held_out.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 2048
    ids_BS, other_BS = held_out[:1], changed[:1]
    first, second = (
        total(evaluate_all(finished.context, checkpoint, ids)) for ids in (ids_BS, other_BS)
    )
    assert first.num_tokens == second.num_tokens == 64
    assert first.kl == second.kl, "inputs are the same"
    assert first.source_loss != second.source_loss


def test_splitting_the_head_into_calls_changes_no_sum(
    finished: SmallRun,
    checkpoint: CompressedExperts,
    held_out: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids_BS = held_out[:1]
    whole = total(evaluate_all(finished.context, checkpoint, ids_BS))
    monkeypatch.setattr(evaluate, "TOKENS_PER_HEAD_CALL", 7)
    split = total(evaluate_all(finished.context, checkpoint, ids_BS))
    for name in ("source_loss", "compressed_loss", "kl"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert (split.source_correct, split.compressed_correct, split.num_tokens) == (
        whole.source_correct,
        whole.compressed_correct,
        64,
    )


def cell(
    document: int, stretch: int, tokens: int, loss: float, correct: int, other: bool = True
) -> EvaluationCell:
    return EvaluationCell(
        document=document,
        stretch=stretch,
        num_tokens=tokens,
        source_loss=loss,
        source_correct=correct,
        compressed_loss=2 * loss,
        compressed_correct=correct - 1,
        kl=loss / 8,
        in_groups_of_32=CompressedSums(loss=3 * loss, correct=correct - 2, kl=loss / 4)
        if other
        else None,
    )


def part_of(number: int, *cells: EvaluationCell) -> EvaluationPart:
    return EvaluationPart(
        plan_digest="d", evaluation="e", part=number, stretch_ends=(8, 32), cells=cells
    )


def quality_of(tokens: int, loss: float, correct: int, cells: int = 2) -> dict[str, Any]:
    """Of so many cells, which each lose one correct token of the source's, and two on sparse
    kernels."""
    return {
        "num_tokens": tokens,
        "source_perplexity": math.exp(loss / tokens),
        "source_accuracy": correct / tokens,
        "compressed_perplexity": math.exp(2 * loss / tokens),
        "compressed_accuracy": (correct - cells) / tokens,
        "kl": loss / 8 / tokens,
        "in_groups_of_32": CompressedQuality(
            perplexity=math.exp(3 * loss / tokens),
            accuracy=(correct - 2 * cells) / tokens,
            kl=loss / 4 / tokens,
        ),
    }


def test_result_folds_cells_by_their_tokens() -> None:
    parts = [
        part_of(0, cell(0, 0, 10, 20.0, 5), cell(0, 1, 20, 44.0, 9)),
        part_of(1, cell(0, 0, 4, 12.0, 3), cell(0, 1, 6, 24.0, 3)),
    ]
    assert combine_parts(parts) == EvaluationResult(
        **quality_of(40, 100.0, 20, 4),
        stretches=(
            StretchQuality(**quality_of(14, 32.0, 8), first=1, last=8),
            StretchQuality(**quality_of(26, 68.0, 12), first=9, last=32),
        ),
    )
    without = part_of(1, cell(0, 0, 4, 12.0, 3, other=False), cell(0, 1, 6, 24.0, 3))
    found = combine_parts([parts[0], without])
    assert found.in_groups_of_32 is None and found.stretches[0].in_groups_of_32 is None
    assert found.stretches[1].in_groups_of_32 is not None, "where all have it, it is said"


def test_domains_are_sources_of_a_name_and_those_without_one_are_other() -> None:
    parts = [
        part_of(0, cell(0, 0, 10, 20.0, 5), cell(0, 1, 20, 44.0, 9)),
        part_of(1, cell(1, 0, 4, 12.0, 3), cell(1, 1, 6, 24.0, 3)),
        part_of(2, cell(3, 0, 1, 7.0, 3), cell(3, 1, 3, 11.0, 3)),
        part_of(3, cell(2, 0, 8, 8.0, 3), cell(2, 1, 8, 4.0, 3)),
    ]
    found = combine_parts(parts, ["code", None, "chat", "code"])
    assert [d.name for d in found.domains] == ["code", "chat", "other"]
    code, chat, other = found.domains
    assert code == DomainQuality(
        **quality_of(34, 82.0, 20, 4),
        name="code",
        stretches=(
            StretchQuality(**quality_of(11, 27.0, 8), first=1, last=8),
            StretchQuality(**quality_of(23, 55.0, 12), first=9, last=32),
        ),
    )
    assert (chat.num_tokens, chat.kl) == (16, 12.0 / 8 / 16)
    assert (other.num_tokens, other.kl) == (10, 36.0 / 8 / 10)
    assert found.num_tokens == 60
    assert combine_parts(parts, [None] * 4).domains == () == combine_parts(parts).domains
    named = combine_parts(parts, ["code", "other", "chat", None])
    assert [d.name for d in named.domains] == ["code", "other", "chat"]
    assert named.domains[1].num_tokens == 14, "a source that is called other is with the others"


def test_parts_are_combined_in_any_order_to_the_same_figures() -> None:
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [
        part_of(
            n, *(cell(d, s, 3, losses[4 * n + 2 * d + s].item(), 3) for d in (0, 1) for s in (0, 1))
        )
        for n in range(10)
    ]
    names = ["a", "b"]
    assert combine_parts(parts[::-1], names) == combine_parts(parts, names)
    assert combine_parts(parts[3:] + parts[:3], names) == combine_parts(parts, names)


# Resuming, and other settings


@pytest.fixture
def copied(finished: SmallRun, tmp_path: Path) -> Path:
    """A copy of the run root without what later stages can do without."""
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, ignore=shutil.ignore_patterns("residuals", "part-*.arrow"))
    return root


def run_again(
    monkeypatch: pytest.MonkeyPatch, finished: SmallRun, root: Path, *overrides: str
) -> tuple[Report, list[int]]:
    """The job on an existing run root; which parts it evaluated. Earlier stages must find nothing
    to do."""
    evaluated: list[int] = []

    def spy(
        context: StageContext,
        compressed: CompressedExperts,
        ids_BS: Tensor,
        documents_B: Sequence[int],
        part: SequencePart,
    ) -> EvaluationPart:
        evaluated.append(part.part)
        return evaluate_part(context, compressed, ids_BS, documents_B, part)

    def refuse(*_: object) -> None:
        raise AssertionError("this stage is done")

    monkeypatch.setattr(evaluate, "evaluate_part", spy)
    for stage in ("capture", "compress", "verify"):
        monkeypatch.setitem(STAGES, stage, replace(STAGES[stage], body=refuse))
    return run_locally(prepare(configure(finished.source, root, *overrides))), evaluated


def test_finished_evaluation_is_not_run_again(
    finished: SmallRun, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, evaluated = run_again(monkeypatch, finished, copied)
    assert evaluated == []
    assert report.quality == finished.report.quality


def test_only_the_missing_part_is_evaluated_and_to_the_same_sums(
    finished: SmallRun, digest: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = copied / run_root.evaluation_part(digest, 1)
    before = missing.read_bytes()
    missing.unlink()
    report, evaluated = run_again(monkeypatch, finished, copied)
    assert evaluated == [1]
    assert missing.read_bytes() == before
    assert report.quality == finished.report.quality


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "the source's loss: expected a finite sum, found nan"),
        (2, "the compressed model's loss: expected"),
        (4, "KL: expected"),
        (7, "its KL with these: expected"),
    ],
)
def test_sum_that_is_not_finite_is_an_error_that_names_the_part_and_leaves_nothing(
    finished: SmallRun,
    digest: str,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    words: str,
) -> None:
    """The other part is there, the same command goes on once the cause is gone."""
    parts = [copied / run_root.evaluation_part(digest, n) for n in (0, 1)]
    before = parts[1].read_bytes()
    for path in parts:
        path.unlink()
    real = evaluate.compare_logits

    def spoiled(source_TV: Tensor, *others_TV: Tensor, labels_T: Tensor) -> Tensor:
        figures_RT = real(source_TV, *others_TV, labels_T=labels_T)
        if len(labels_T) == 2 * 64:  # of the first part
            figures_RT[place, 70] = torch.nan
        return figures_RT

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compare_logits", spoiled)
        with pytest.raises(StageFailedError, match="1 of 2 tasks failed") as caught:
            run_again(patch, finished, copied)
    text = str(caught.value)
    assert "NumericsError: evaluation, part 0 (held-out sequences 0 to 1): " + words in text
    assert not parts[0].exists() and parts[1].read_bytes() == before
    report, evaluated = run_again(monkeypatch, finished, copied)
    assert evaluated == [0]
    assert report.quality == finished.report.quality


def test_null_in_a_part_of_before_is_made_anew(
    finished: SmallRun, digest: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied / run_root.evaluation_part(digest, 1)
    before = path.read_bytes()
    said = json.loads(before)
    said["cells"][1]["kl"] = None
    path.write_text(json.dumps(said))
    report, evaluated = run_again(monkeypatch, finished, copied)
    assert evaluated == [1]
    assert path.read_bytes() == before and report.quality == finished.report.quality


def test_loss_whose_exponential_is_no_number_is_said() -> None:
    loud = cell(0, 0, 1, 2.0, 1).model_copy(update={"compressed_loss": 800.0})
    with pytest.raises(NumericsError, match="found 800 nats a token"):
        combine_parts([part_of(0, loud, cell(0, 1, 1, 2.0, 1))])


def test_other_held_out_settings_are_evaluated_anew_beside_the_old_ones(
    finished: SmallRun, digest: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, evaluated = run_again(
        monkeypatch, finished, copied, "evaluation.seed=5", "evaluation.num_sequences=2"
    )
    assert evaluated == [0]
    folders = sorted(path.name for path in (copied / "evaluation").iterdir())
    assert len(folders) == 2 and digest in folders
    assert report.quality is not None and report.quality.num_tokens == 2 * 64
    assert report.quality != finished.report.quality


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.seed=1",
        "evaluation.num_sequences=4",
        "evaluation.sequence_length=32",
        "evaluation.sequences_per_part=3",
        "compression.sweeps=2",
    ],
)
def test_another_setting_gives_the_evaluation_another_digest(
    finished: SmallRun, digest: str, override: str
) -> None:
    plan = prepare(configure(finished.source, "memory://digests", override)).plan
    assert plan.config.evaluation is not None
    assert evaluation_digest(plan, plan.config.evaluation) != digest


def test_digest_of_an_evaluation_follows_the_texts_and_not_their_place(
    finished: SmallRun, digest: str, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copy(TINY / "heldout.jsonl", copy)

    def found() -> str:
        plan = prepare(
            configure(finished.source, "memory://digests", f"evaluation.documents={copy}")
        ).plan
        assert plan.config.evaluation is not None
        return evaluation_digest(plan, plan.config.evaluation)

    assert found() == digest
    copy.write_bytes(copy.read_bytes() + b'{"text": "one more"}\n')
    assert found() != digest


# By domain

GERMAN, HELD_OUT = REPO / "examples" / "held-out" / "german.jsonl", TINY / "heldout.jsonl"


def mix(*names: str | None) -> str:
    """Two sequences of Python's texts, three of German ones, one more of Python's, as a setting.
    `names`: of the sources."""
    sources = [
        {"path": str(path), "weight": weight, "name": name}
        for (path, weight), name in zip(
            ((HELD_OUT, 2.0), (GERMAN, 3.0), (HELD_OUT, 1.0)), names, strict=True
        )
    ]
    return f"evaluation.documents={json.dumps(sources)}"


def test_domains_figures_are_those_of_their_own_sequences(
    finished: SmallRun, checkpoint: CompressedExperts, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluated by itself, whatever the draw has put between them."""
    settings = (mix("python", "German", "python"), "evaluation.num_sequences=6")
    report, evaluated = run_again(monkeypatch, finished, copied, *settings)
    assert evaluated == [0, 1, 2]
    q = report.quality
    assert q is not None and [d.name for d in q.domains] == ["python", "German"]
    assert [(s.first, s.last) for s in q.stretches] == [(1, 8), (9, 32), (33, 64)]
    prepared = prepare(configure(finished.source, copied, *settings))
    assert prepared.plan.config.evaluation is not None
    own = evaluation_digest(prepared.plan, prepared.plan.config.evaluation)
    ids_NS, origins = evaluate.held_out_sequences(prepared.context, own)
    assert sorted(origins) == [0, 0, 1, 1, 1, 2]
    assert origins != tuple(sorted(origins)), "a draw that shuffles nothing would prove nothing"
    for domain, places in (("python", (0, 2)), ("German", (1,))):
        ids_BS = ids_NS[[o in places for o in origins]].long()
        alone = combine_parts([evaluate_all(finished.context, checkpoint, ids_BS)])
        found = next(d for d in q.domains if d.name == domain)
        assert found.num_tokens == 3 * 64
        for name in ("source_perplexity", "compressed_perplexity", "kl"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-5)
            for a, b in zip(found.stretches, alone.stretches, strict=True):
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5)
    assert q.domains[1].source_perplexity > 2 * q.domains[0].source_perplexity
    assert q.kl == pytest.approx((q.domains[0].kl + q.domains[1].kl) / 2, rel=1e-12)


def test_names_are_given_and_changed_without_evaluating_again_and_parts_are_resumed(
    finished: SmallRun, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*names: str | None) -> tuple[list[tuple[str, float]], list[int]]:
        settings = (mix(*names), "evaluation.num_sequences=6")
        report, evaluated = run_again(monkeypatch, finished, copied, *settings)
        assert report.quality is not None
        return [(d.name, d.kl) for d in report.quality.domains], evaluated

    assert again(None, None, None) == ([], [0, 1, 2])
    parts = sorted(copied.glob("evaluation/*/part-*.json"), key=lambda p: p.stat().st_mtime)[-3:]
    before = {path: path.read_bytes() for path in parts}
    ((prose, kl), (other, _)), evaluated = again("prose", None, "prose")
    assert (prose, other, evaluated) == ("prose", "other", [])
    parts[1].unlink()
    found, evaluated = again("Python", "German", "Python")
    assert found[0] == ("Python", kl) and found[1][0] == "German"
    assert len(evaluated) == 1
    assert {path: path.read_bytes() for path in parts} == before


def test_part_of_before_stretches_is_made_anew(
    finished: SmallRun, digest: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its digest: a record without cells is none."""
    path = copied / run_root.evaluation_part(digest, 0)
    before = path.read_bytes()
    said = json.loads(before)
    sums = {k: v for k, v in said["cells"][0].items() if k not in ("document", "stretch")}
    old = {k: v for k, v in said.items() if k not in ("cells", "stretch_ends")} | sums
    path.write_text(json.dumps(old))
    report, evaluated = run_again(monkeypatch, finished, copied)
    assert evaluated == [0]
    assert path.read_bytes() == before and report.quality == finished.report.quality


def test_ends_of_the_stretches_are_in_the_digest_and_names_are_not(
    finished: SmallRun, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*overrides: str) -> str:
        plan = prepare(configure(finished.source, "memory://digests", *overrides)).plan
        assert plan.config.evaluation is not None
        assert plan.units_digest == finished.prepared.plan.units_digest
        return evaluation_digest(plan, plan.config.evaluation)

    named = json.dumps([{"path": str(HELD_OUT), "name": "python"}])
    assert found(f"evaluation.documents={named}") == digest
    calibration = json.dumps([{"path": f"{TINY}/calibration.jsonl", "name": "python"}])
    assert found(f"calibration.documents={calibration}") == digest
    monkeypatch.setattr(evaluate, "stretch_ends", lambda length: (length,))
    assert found() != digest


def test_packed_texts_that_do_not_say_their_origins_are_packed_again(
    finished: SmallRun, digest: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = run_root.evaluation_tokens(digest)
    shutil.copy(finished.root / key, copied / key)
    path = copied / run_root.manifest_of(key)
    before = path.read_bytes()
    path.write_text(json.dumps(json.loads(before) | {"origins": []}))
    part = copied / run_root.evaluation_part(digest, 1)
    sums = part.read_bytes()
    part.unlink()
    report, _ = run_again(monkeypatch, finished, copied)
    assert (path.read_bytes(), part.read_bytes()) == (before, sums)
    assert report.quality == finished.report.quality


def test_domain_without_a_sequence_is_refused_before_anything_is_written(
    finished: SmallRun, tmp_path: Path
) -> None:
    words = (
        "evaluation.num_sequences: expected a sequence of every domain, found 1 with none of"
        " python, other: by the weights of evaluation.documents"
    )
    with pytest.raises(ConfigError, match=words):
        prepare(
            configure(
                finished.source,
                tmp_path / "run",
                mix("python", "German", None),
                "evaluation.num_sequences=1",
            )
        )
    assert not (tmp_path / "run").exists()
    prepare(
        configure(
            finished.source,
            tmp_path,
            mix("python", "German", "python"),
            "evaluation.num_sequences=2",
        )
    )


def test_run_without_evaluation_settings_reports_no_quality(
    finished: SmallRun, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, evaluated = run_again(monkeypatch, finished, copied, "evaluation=null")
    assert (report.quality, evaluated) == (None, [])


@pytest.mark.slow
def test_texts_are_looked_at_once_and_may_be_gone_when_all_sums_are_there(
    finished: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, looked = tmp_path / "run", []
    shutil.copytree(finished.root, root)
    shutil.rmtree(root / "evaluation")
    texts = tmp_path / "heldout.jsonl"
    shutil.copy(TINY / "heldout.jsonl", texts)
    prepared = prepare(configure(finished.source, root, f"evaluation.documents={texts}"))
    real, digest = evaluate.evaluate_part, evaluate.digest_documents

    def evaluate_and_hide(*args: Any) -> Any:
        texts.unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(evaluate, "evaluate_part", evaluate_and_hide)
    monkeypatch.setattr(
        evaluate, "digest_documents", lambda *args: (looked.append(args), digest(*args))[1]
    )
    report = run_locally(prepared)
    assert report.quality == finished.report.quality
    assert len(looked) == 2, "once for the packed texts, once for the stage"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no cells", "a cell less", "other stretch", "other source"])
def test_part_whose_cells_are_not_its_sequences_is_made_anew(
    finished: SmallRun, tmp_path: Path, damage: str
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    (path, *_) = sorted((root / "evaluation").rglob("part-*.json"))
    expected, said = path.read_bytes(), json.loads(path.read_bytes())
    if damage == "no cells":
        said["cells"] = []
    elif damage == "a cell less":
        del said["cells"][0]
    elif damage == "other stretch":
        said["cells"][0]["stretch"] = 9
    else:
        said["cells"][0]["document"] = 9
    path.write_text(json.dumps(said))
    shutil.rmtree(root / "report")
    report = run_locally(prepare(configure(finished.source, root)))
    assert path.read_bytes() == expected
    assert report.quality == finished.report.quality


@pytest.mark.slow
def test_origins_beyond_the_mix_are_packed_anew(finished: SmallRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    (path,) = (root / "evaluation").rglob("tokens.json")
    said = json.loads(path.read_bytes())
    path.write_text(json.dumps(said | {"origins": [9] * len(said["origins"])}))
    for part in (root / "evaluation").rglob("part-*.json"):
        part.unlink()
    shutil.rmtree(root / "report")
    report = run_locally(prepare(configure(finished.source, root)))
    assert json.loads(path.read_bytes())["origins"] == said["origins"]
    assert report.quality == finished.report.quality
