"""Capture against the whole model run by transformers, and its resumption."""

from pathlib import Path

import pytest
import torch

from p48ray.config.load import load_config
from p48ray.model import decoder as decoder_module
from p48ray.model.experts import RoutedInputs
from p48ray.numerics.headroom import SUBNORMAL_SHARE
from p48ray.run import arrow, run_root
from p48ray.run.manifest import LayerScales
from p48ray.run.plan import RunPlan, SequencePart
from p48ray.run.scales import write_layer_scales
from p48ray.stages import capture
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import capture_parts
from p48ray.stages.inputs import write_inputs
from p48ray.stages.prepare import prepare
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY, timeless
from tests.reference import whole_model
from tests.stages.small_run import write_inputs_once

pytestmark = pytest.mark.slow

SETTINGS = (
    "calibration.num_sequences=5",
    "calibration.sequence_length=64",
    "calibration.sequences_per_part=2",
    "compression.output_curvature=false",
    "evaluation=null",
)


def open_run(root: Path, *overrides: str) -> StageContext:
    prepared = prepare(
        load_config(REPO / "configs" / "tiny.yaml", (*SETTINGS, *overrides), str(root))
    )
    write_inputs_once(prepared)
    return prepared.context


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return open_run(tmp_path)


def token_ids(context: StageContext) -> torch.Tensor:
    return arrow.decode(context.store.get(run_root.TOKENS), "tokens")["token_ids"]


def test_captured_inputs_and_router_weights_equal_the_whole_models(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 before the cast to 1e-4, the stored bits exactly the cast's, expert ids but for ties
    under 1e-5."""
    raw: dict[tuple[int, int], RoutedInputs] = {}
    write = capture.write_activations

    def spy(
        context: StageContext,
        writer: BlobWriter,
        layer: int,
        part: SequencePart,
        seen: RoutedInputs,
        start: float,
    ) -> None:
        raw[layer, part.part] = RoutedInputs(*(t.clone() for t in seen))
        write(context, writer, layer, part, seen, start)

    monkeypatch.setattr(capture, "write_activations", spy)
    capture_parts(context, [p.part for p in context.plan.parts])
    _, expected = whole_model.run_and_record(whole_model.load(TINY), token_ids(context).long())
    for layer in context.plan.source.moe_layers:
        parts = [raw[layer, p.part] for p in context.plan.parts]
        hidden_TH = torch.cat([p.hidden_TH for p in parts])
        want = expected[layer]
        scale = want.hidden_TH.abs().max()
        assert (hidden_TH - want.hidden_TH).abs().max() <= 1e-4 * scale
        stored = [
            arrow.decode(context.store.get(run_root.activation_part(layer, p.part)), "part")
            for p in context.plan.parts
        ]
        assert torch.equal(
            torch.cat([s["hidden"] for s in stored]).view(torch.int16),
            hidden_TH.to(torch.bfloat16).view(torch.int16),
        )
        check_routing(
            torch.cat([s["expert_ids"] for s in stored]),
            torch.cat([s["router_weights"] for s in stored]),
            want,
        )


def check_routing(ids_TK: torch.Tensor, weights_TK: torch.Tensor, want: whole_model.Seen) -> None:
    """Same experts in any order; where a token's sets differ, the weights must be a tie. Same
    weights per expert."""
    ours = torch.zeros(len(ids_TK), 16).scatter_(1, ids_TK.long(), weights_TK)
    theirs = torch.zeros(len(ids_TK), 16).scatter_(1, want.expert_ids_TK, want.router_weights_TK)
    same = ((ours > 0) == (theirs > 0)).all(1)
    assert same.float().mean() > 0.999
    assert torch.allclose(ours[same], theirs[same], rtol=1e-4, atol=1e-6)
    for token in torch.nonzero(~same).flatten().tolist():
        differing = torch.cat(
            [ours[token][ours[token] != theirs[token]], theirs[token][ours[token] != theirs[token]]]
        )
        assert differing[differing > 0].max() - differing[differing > 0].min() < 1e-4


def test_scales_are_those_of_the_layers_maxima(context: StageContext) -> None:
    """gate/up from amax of the stored inputs, down from that of the dense intermediates, over all
    parts and experts; each with as much room as its own groups allow."""
    capture_parts(context, [p.part for p in context.plan.parts])
    for layer in context.plan.layers:
        write_layer_scales(context.plan, context.store, layer)
    model = whole_model.load(TINY)
    _, seen = whole_model.run_and_record(model, token_ids(context).long())
    for layer in context.plan.source.moe_layers:
        scales = LayerScales.load(context.store, run_root.layer_scales(layer))
        x_TH, experts = seen[layer].hidden_TH, model.model.layers[layer].mlp.experts
        amax_h = 0.0
        for e in range(16):
            rows = (seen[layer].expert_ids_TK == e).any(1)
            if rows.any():
                gate, up = (x_TH[rows] @ experts.gate_up_proj[e].T).chunk(2, -1)
                amax_h = max(amax_h, (torch.nn.functional.silu(gate) * up).abs().max().item())
        # one bf16 rounding apart
        room_x, room_h = scales.headroom
        amax_x = x_TH.abs().max().item()
        assert scales.gate_up == pytest.approx(448 * 6 / (room_x * amax_x), rel=5e-3)
        assert scales.down == pytest.approx(448 * 6 / (room_h * amax_h), rel=1e-4)
        groups_x = x_TH.unflatten(1, (-1, 16)).abs().amax(-1)
        assert scales.calibration[0].groups == groups_x.numel()
        assert scales.calibration[1].groups > 0
        for room, counts in zip(scales.headroom, scales.calibration, strict=True):
            assert room in (1, 2, 4, 8, 16) and counts.saturated == 0
            assert counts.subnormal + counts.zero <= SUBNORMAL_SHARE * counts.groups
        # the groups of this small model lie within a thousandfold of the largest
        assert room_x == 16 and (groups_x > amax_x * 16 / 28672).all()
        assert sum(scales.tokens_per_expert) == x_TH.shape[0] * 4


def files(root: Path, *prefixes: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): timeless(p.read_bytes())
        for f in prefixes
        for p in sorted((root / f).rglob("*"))
        if p.is_file()
    }


def test_capture_is_the_same_whoever_owns_the_parts_and_wherever_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_run(tmp_path / "whole")
    capture_parts(whole, [0, 1, 2])
    resumed = open_run(tmp_path / "resumed")
    real = decoder_module.Decoder.layer
    layers_run = []

    def dying(self: decoder_module.Decoder, number: int, experts: object) -> torch.nn.Module:
        layers_run.append(number)
        if layers_run.count(3) == 1 and number == 3:
            raise KeyboardInterrupt
        return real(self, number, experts)  # type: ignore[arg-type]

    monkeypatch.setattr(capture.Decoder, "layer", dying)
    with pytest.raises(KeyboardInterrupt):
        capture_parts(resumed, [2, 0])
    layers_run.append(3)
    layers_run.clear()
    layers_run.append(3)
    capture_parts(resumed, [0, 2])
    assert layers_run == [3, 3, 4], "a repeated task starts at the boundary where it stopped"
    capture_parts(resumed, [1])
    assert files(tmp_path / "whole", "activations", "residuals") == files(
        tmp_path / "resumed", "activations", "residuals"
    )


def test_finished_parts_are_not_run_again(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_parts(context, [0, 1])

    def refuse(*_: object) -> None:
        raise AssertionError("no layer should be built")

    monkeypatch.setattr(capture.Decoder, "layer", refuse)
    assert capture_parts(context, [0, 1]) == []


def test_plan_is_written_before_texts_and_texts_are_read_before_the_plan(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    prepared = prepare(
        load_config(
            REPO / "configs" / "tiny.yaml",
            (f"calibration.documents={empty}",),
            str(tmp_path / "run"),
        )
    )
    with pytest.raises(
        Exception,
        match=(
            r"calibration\.documents: .*empty\.jsonl: expected text for 192 sequences of 512"
            r" tokens, found 0"
        ),
    ):
        write_inputs(prepared)
    assert not (tmp_path / "run").exists()


def test_plan_in_the_run_root_is_the_plan(context: StageContext) -> None:
    assert RunPlan.load(context.store, run_root.PLAN) == context.plan
