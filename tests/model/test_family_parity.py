"""Every family, streamed layer by layer, against transformers' own whole model: captured inputs,
routing, logits, gradients; float32 and bf16."""

import uuid
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p48ray.model.decoder import run_layer
from p48ray.model.experts import RoutedInputs
from p48ray.run import arrow, run_root
from p48ray.run.plan import SequencePart
from p48ray.stages import gradients
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import capture_parts
from p48ray.stages.derivatives import sample_labels
from p48ray.stages.prepare import prepare
from p48ray.stages.streaming import opened_layer
from p48ray.unit.context import StageContext
from tests.reference import tiny_families, whole_gradients, whole_model
from tests.stages.small_run import configure, write_inputs_once
from tests.stages.ways import go_back

pytestmark = pytest.mark.slow

SETTINGS = (
    "calibration.num_sequences=5",
    "calibration.sequence_length=160",  # beyond the 128 positions that yarn starts from
    "calibration.sequences_per_part=2",
    "compression.output_curvature=true",
    "evaluation=null",
)
PARTS = [0, 1, 2]


@pytest.fixture(scope="module", params=tiny_families.NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.write_release(family, tmp_path_factory.mktemp("release") / family)


def open_run(source: Path, *overrides: str) -> StageContext:
    prepared = prepare(configure(source, f"memory://{uuid.uuid4().hex}", *SETTINGS, *overrides))
    write_inputs_once(prepared)
    return prepared.context


def token_ids(context: StageContext) -> Tensor:
    return arrow.decode(context.store.get(run_root.TOKENS), "tokens")["token_ids"].long()


def streamed(context: StageContext) -> tuple[dict[int, RoutedInputs], dict[int, Tensor]]:
    """What experts saw at every layer, and the gradients at its routed output, before the cast to
    what is stored."""
    raw: dict[tuple[int, int], RoutedInputs] = {}
    felt: dict[tuple[int, int], Tensor] = {}
    write_activations, write_gradients = gradients.write_activations, gradients.write_gradients

    def see(
        context: StageContext,
        writer: BlobWriter,
        layer: int,
        part: SequencePart,
        seen: RoutedInputs,
        start: float,
    ) -> None:
        raw[layer, part.part] = RoutedInputs(*(t.clone() for t in seen))
        write_activations(context, writer, layer, part, seen, start)

    def feel(
        context: StageContext,
        writer: BlobWriter,
        layer: int,
        part: SequencePart,
        delta_TH: Tensor,
        start: float,
    ) -> None:
        felt[layer, part.part] = delta_TH.clone()
        write_gradients(context, writer, layer, part, delta_TH, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "write_activations", see)
        patch.setattr(gradients, "write_gradients", feel)
        capture_parts(context, PARTS)
        go_back(context, PARTS)
    layers = context.plan.source.moe_layers
    joined = {
        n: [torch.cat([raw[n, p][field] for p in PARTS]) for field in range(3)] for n in layers
    }
    return {n: RoutedInputs(*joined[n], torch.zeros(()), torch.zeros(0)) for n in layers}, {
        n: torch.cat([felt[n, p] for p in PARTS]) for n in layers
    }


def labels_of(context: StageContext, probabilities_TV: Tensor) -> Tensor:
    """What the stage has to sample: part by part, from a generator of the part's own."""
    calibration = context.plan.config.calibration
    generators = [
        torch.Generator().manual_seed(calibration.seed * 2**20 + p.part) for p in context.plan.parts
    ]
    pieces = probabilities_TV.split(
        [p.num_sequences * calibration.sequence_length for p in context.plan.parts]
    )
    return torch.cat(
        [
            sample_labels(piece, generator)
            for piece, generator in zip(pieces, generators, strict=True)
        ]
    )


@torch.no_grad()
def streamed_logits(context: StageContext, ids_BS: Tensor) -> Tensor:
    decoder = context.decoder()
    x_BSH, positions = decoder.embed(ids_BS), decoder.positions(ids_BS.shape[1])
    for number in range(context.layout.num_layers):
        with opened_layer(context, decoder, number) as layer:
            x_BSH = run_layer(layer, x_BSH, positions, micro_batch=2)
    logits: Tensor = decoder.head()(x_BSH)
    return logits


def dense_routing(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, experts): a token's router weights by expert, 0 for those that it is not sent to."""
    return torch.zeros(len(ids_TK), tiny_families.EXPERTS).scatter_(
        1, ids_TK.long(), weights_TK.float()
    )


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def test_inputs_and_routing_are_the_whole_models(family: str, source: Path) -> None:
    context = open_run(source)
    found, _ = streamed(context)
    _, expected = whole_model.run_and_record(whole_model.load(source), token_ids(context))
    assert tuple(found) == tuple(sorted(expected)) == tiny_families.moe_layers(family)
    for layer, want in expected.items():
        assert gap(found[layer].hidden_TH, want.hidden_TH) <= 1e-4
        ours = dense_routing(found[layer].expert_ids_TK, found[layer].router_weights_TK)
        theirs = dense_routing(want.expert_ids_TK, want.router_weights_TK)
        same_T = ((ours > 0) == (theirs > 0)).all(1)
        assert same_T.float().mean() > 0.998, "other experts only where two are level"
        assert torch.allclose(ours[same_T], theirs[same_T], rtol=1e-3, atol=1e-5)
        assert ((ours > 0).sum(0) > 0).sum() >= tiny_families.EXPERTS - 1, (
            "the test would prove little if few experts were used"
        )


def test_logits_are_the_whole_models(source: Path) -> None:
    context = open_run(source)
    ids_BS = token_ids(context)
    expected, _ = whole_model.run_and_record(whole_model.load(source), ids_BS)
    assert gap(streamed_logits(context, ids_BS), expected) <= 1e-4


def test_delta_is_autograds_through_the_whole_model(source: Path) -> None:
    context = open_run(source)
    _, found = streamed(context)
    expected, _ = whole_gradients.at_routed_outputs(
        whole_model.load(source), token_ids(context), lambda p_TV: labels_of(context, p_TV)
    )
    assert tuple(found) == tuple(sorted(expected))
    for layer, want_TH in expected.items():
        assert gap(found[layer], want_TH) <= 1e-4


def test_bf16_is_as_near_to_float32_as_transformers_own_bf16(source: Path) -> None:
    """Routing jumps where two experts are level, so single values say little: norms, and the
    distance of transformers' run as the measure."""
    context = open_run(source, "calibration.compute_dtype=bfloat16")
    ids_BS = token_ids(context)
    exact, exact_seen = whole_model.run_and_record(whole_model.load(source), ids_BS)
    rounded, rounded_seen = whole_model.run_and_record(
        whole_model.load(source, torch.bfloat16), ids_BS
    )
    assert streamed_logits(context, ids_BS).dtype == rounded.dtype == torch.bfloat16
    noise = distance(rounded, exact)
    assert 1e-3 < noise < 0.3
    assert distance(streamed_logits(context, ids_BS), exact) <= 1.25 * noise
    found, _ = streamed(context)
    for layer, want in exact_seen.items():
        assert distance(found[layer].hidden_TH, want.hidden_TH) <= 1.25 * distance(
            rounded_seen[layer].hidden_TH, want.hidden_TH
        )
