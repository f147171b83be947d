"""Gradients against autograd through the whole model run by transformers, their resumption, and how
much of the model they hold at once."""

import hashlib
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from p48ray.errors import CalibrationError, CorruptObjectError
from p48ray.model.decoder import Decoder, run_layer
from p48ray.model.experts import ExpertWeights
from p48ray.run import arrow, run_root
from p48ray.run.checked import load_part_manifest
from p48ray.run.manifest import ActivationPart, GradientPart
from p48ray.run.plan import SequencePart
from p48ray.stages import capture, derivatives, gradients, streaming
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import capture_parts, write_boundary
from p48ray.stages.derivatives import head_gradient, layer_or_head, sample_labels, step_back
from p48ray.stages.gradients import SegmentPass, gradient_parts
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY
from tests.reference import whole_gradients, whole_model
from tests.stages.test_capture import files, open_run, token_ids
from tests.stages.ways import go_back

CURVED = "compression.output_curvature=true"
EXPERT = -1  # among layers' numbers: a decoded expert, whatever its layer
HEAD = 5  # the tiny model has a dense layer 0 and mixtures 1 to 4


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with everything that the backward pass starts from; copied, never used itself."""
    root = tmp_path_factory.mktemp("captured") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        torch.set_num_threads(1)
        capture_parts(open_run(root, CURVED), [0, 1, 2])
    return root


def copy_of(captured: Path, root: Path) -> StageContext:
    shutil.copytree(captured, root)
    return open_run(root, CURVED)


@pytest.fixture
def context(captured: Path, tmp_path: Path) -> StageContext:
    return copy_of(captured, tmp_path / "run")


def labels_of(context: StageContext, probabilities_TV: Tensor) -> Tensor:
    """What the stage has to sample: part by part, from a generator of the part's own."""
    length, calibration = (
        context.plan.config.calibration.sequence_length,
        context.plan.config.calibration,
    )
    generators = [
        torch.Generator().manual_seed(calibration.seed * 2**20 + p.part) for p in context.plan.parts
    ]
    pieces = probabilities_TV.split([p.num_sequences * length for p in context.plan.parts])
    return torch.cat(
        [
            sample_labels(piece, generator)
            for piece, generator in zip(pieces, generators, strict=True)
        ]
    )


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.slow
def test_delta_is_autograds_through_the_whole_model(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 before the cast to 1e-4 of the layer's largest value, the stored bits exactly the
    cast's."""
    raw: dict[tuple[int, int], Tensor] = {}
    write = gradients.write_gradients

    def spy(
        context: StageContext,
        writer: BlobWriter,
        layer: int,
        part: SequencePart,
        delta_TH: Tensor,
        start: float,
    ) -> None:
        raw[layer, part.part] = delta_TH.clone()
        write(context, writer, layer, part, delta_TH, start)

    monkeypatch.setattr(gradients, "write_gradients", spy)
    manifests = go_back(context, [0, 1, 2])
    routed, entering = whole_gradients.at_routed_outputs(
        whole_model.load(TINY),
        token_ids(context).long(),
        lambda probabilities_TV: labels_of(context, probabilities_TV),
    )
    assert set(routed) == set(context.plan.source.moe_layers) == {1, 2, 3, 4}
    for layer, want_TH in routed.items():
        parts = [raw[layer, p.part] for p in context.plan.parts]
        assert all(p.dtype == torch.float32 for p in parts)
        assert relative_gap(torch.cat(parts), want_TH) <= 1e-4
        for part, delta_TH in zip(context.plan.parts, parts, strict=True):
            stored_TH = arrow.decode(
                context.store.get(run_root.gradient_part(layer, part.part)), "part"
            )["delta"]
            assert torch.equal(
                stored_TH.view(torch.int16), delta_TH.to(torch.bfloat16).view(torch.int16)
            )
    for number in range(2, HEAD):
        stored = [
            arrow.decode(
                context.store.get(run_root.blob("residual-gradients", number, p.part)), "r"
            )
            for p in context.plan.parts
        ]
        assert relative_gap(torch.cat([s["values"] for s in stored]), entering[number]) <= 1e-4
    for manifest in manifests:
        delta_TH = raw[manifest.layer, manifest.part]
        data = context.store.get(run_root.gradient_part(manifest.layer, manifest.part))
        assert manifest.num_tokens == len(delta_TH)
        assert (manifest.size_bytes, manifest.sha256) == (
            len(data),
            hashlib.sha256(data).hexdigest(),
        )
        assert manifest.mean_square == pytest.approx(
            delta_TH.double().square().sum(1).mean().item(), rel=1e-5
        )
    assert sorted((m.layer, m.part) for m in manifests) == [
        (layer, p) for layer in (1, 2, 3, 4) for p in range(3)
    ]


def test_rows_of_delta_are_those_of_the_activations(context: StageContext) -> None:
    go_back(context, [0, 1, 2])
    lengths = [(len(part["hidden"]), len(part["delta"])) for part in context.activation_parts(3)]
    assert lengths == [(128, 128), (128, 128), (64, 64)]


class Death(BaseException):
    """Like a killed process: nothing catches it."""


def die_at_layer(monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    """Between two layers: before `fatal` is built."""
    real = Decoder.layer

    def layer(self: Decoder, number: int, experts: object) -> nn.Module:
        if number == fatal:
            raise Death
        return real(self, number, experts)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "layer", layer)


def die_at_write(monkeypatch: pytest.MonkeyPatch, layer: int, part: int) -> None:
    """Between two parts of a layer: its stream has gone down, its delta is not written."""
    write = gradients.write_gradients

    def dying(
        context: StageContext,
        writer: BlobWriter,
        number: int,
        owner: SequencePart,
        delta_TH: Tensor,
        start: float,
    ) -> None:
        if (number, owner.part) == (layer, part):
            raise Death
        write(context, writer, number, owner, delta_TH, start)

    monkeypatch.setattr(gradients, "write_gradients", dying)


def die_at_manifest(monkeypatch: pytest.MonkeyPatch, layer: int, part: int) -> None:
    """A delta that no manifest vouches for."""
    fatal = run_root.gradient_manifest(layer, part)
    real = GradientPart.to_json

    def to_json(self: GradientPart) -> bytes:
        if run_root.gradient_manifest(self.layer, self.part) == fatal:
            raise Death
        return real(self)

    monkeypatch.setattr(GradientPart, "to_json", to_json)


def die_at_put(monkeypatch: pytest.MonkeyPatch, number: int, part: int) -> None:
    """Before a boundary is stored; inside a layer's parts."""
    real = SegmentPass.put

    def put(
        self: SegmentPass, layer: int, owner: SequencePart, gradient_BSH: Tensor, start: float
    ) -> None:
        if (layer, owner.part) == (number, part):
            raise Death
        real(self, layer, owner, gradient_BSH, start)

    monkeypatch.setattr(SegmentPass, "put", put)


def test_gradients_are_the_same_whoever_owns_the_parts_and_wherever_they_stopped(
    captured: Path, tmp_path: Path
) -> None:
    go_back(copy_of(captured, tmp_path / "whole"), [0, 1, 2])
    resumed = copy_of(captured, tmp_path / "resumed")
    deaths = [
        (die_at_put, (HEAD, 2), [0, 2]),
        (die_at_layer, (4,), [2, 0]),
        (die_at_write, (4, 1), [0, 1]),
        (die_at_manifest, (3, 1), [1, 2]),
        # how far parts 1 and 2 came is their writers' affair
        (die_at_put, (3, 0), [2, 1, 0]),
        (die_at_layer, (2,), [1, 0]),
        (die_at_write, (1, 0), [0, 2]),
    ]
    for die, where, parts in deaths:
        with pytest.MonkeyPatch.context() as patch:
            die(patch, *where)  # type: ignore[operator]
            with pytest.raises(Death):
                go_back(resumed, parts)
    go_back(resumed, [2])
    go_back(resumed, [1, 0])
    prefixes = ("activations", "gradients", "residual-gradients")
    whole = files(tmp_path / "whole", *prefixes)
    assert len(whole) == 2 * 3 * (4 + 4 + 3)
    assert whole == files(tmp_path / "resumed", *prefixes)


def test_a_repeated_task_starts_at_the_boundary_where_it_stopped(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_at_layer(patch, 3)
        with pytest.raises(Death):
            go_back(context, [0, 1])
    steps = record_steps(monkeypatch)
    written = go_back(context, [1, 0, 2])
    assert steps == [(5, 2), (4, 2), (3, 1), (3, 0), (3, 2), (2, 1), (2, 0), (2, 2)]
    assert sorted((m.layer, m.part) for m in written) == [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (3, 0),
        (3, 1),
        (3, 2),
        (4, 2),
    ]


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer or head, part) of every step down from here on."""
    steps: list[tuple[int, int]] = []
    real = SegmentPass.step

    def step(
        self: SegmentPass,
        number: int,
        module: nn.Module | None,
        passing: list[SequencePart],
        stepping: list[SequencePart],
    ) -> None:
        steps.extend((number, part.part) for part in stepping)
        real(self, number, module, passing, stepping)

    monkeypatch.setattr(SegmentPass, "step", step)
    return steps


def test_finished_parts_are_not_run_again(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_back(context, [0, 1])
    steps = record_steps(monkeypatch)
    assert [(m.layer, m.part) for m in go_back(context, [0, 1, 2])] == [
        (4, 2),
        (3, 2),
        (2, 2),
        (1, 2),
    ]
    assert steps == [(5, 2), (4, 2), (3, 2), (2, 2)]

    def refuse(*_: object) -> None:
        raise AssertionError("nothing should be built")

    monkeypatch.setattr(Decoder, "layer", refuse)
    monkeypatch.setattr(Decoder, "head", refuse)
    assert go_back(context, [0, 1, 2]) == []


def test_no_two_layers_weights_are_ever_held_together(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked whenever weights are read or built: everything still alive belongs to the layer (or the
    head) being worked on."""
    alive: list[tuple[int, weakref.ref[object]]] = []
    built: list[int] = []
    asked: list[int] = []
    layer, head, experts_of = Decoder.layer, Decoder.head, streaming.layer_experts

    def check(number: int) -> None:
        held = {owner for owner, thing in alive if thing() is not None} - {number, EXPERT}
        assert not held, f"while working on layer {number} weights of {held} were still held"

    def track(number: int, module: nn.Module) -> nn.Module:
        alive.extend((number, weakref.ref(thing)) for thing in (module, *module.parameters()))
        built.append(number)
        return module

    def watched_layer(self: Decoder, number: int, experts: object) -> nn.Module:
        check(number)
        return track(number, layer(self, number, experts))  # type: ignore[arg-type]

    def watched_head(self: Decoder) -> nn.Module:
        check(HEAD)
        return track(HEAD, head(self))

    @contextmanager
    def watched_experts(decoder: Decoder, number: int) -> Iterator[Callable[[int], ExpertWeights]]:
        check(number)

        def watched_expert(wanted: int) -> ExpertWeights:
            check(number)
            assert sum(owner == EXPERT and thing() is not None for owner, thing in alive) <= 3, (
                "one decoded expert at a time, and the next one"
            )
            weights = get(wanted)
            alive.extend((EXPERT, weakref.ref(w)) for w in weights)
            asked.append(number)
            return weights

        with experts_of(decoder, number) as get:
            yield watched_expert

    monkeypatch.setattr(Decoder, "layer", watched_layer)
    monkeypatch.setattr(Decoder, "head", watched_head)
    monkeypatch.setattr(streaming, "layer_experts", watched_experts)
    go_back(context, [0, 1, 2])
    assert built == [4, 5, 4, 3, 3, 2, 2, 1], (
        "each is built once up and once down for all parts, and the lowest mixture not down"
    )
    assert set(asked) == {4, 3, 2, 1}
    assert {owner for owner, _ in alive} == {5, 4, 3, 2, 1, EXPERT}
    assert sum(thing() is not None for _, thing in alive) == 0


def spoil(context: StageContext, kind: run_root.BlobKind, number: int, part: int) -> None:
    """A boundary with a value that is not a number, and a manifest that knows it."""
    values_TH = context.boundary(kind, number, part).clone()
    values_TH[5, 7] = torch.nan
    for key in (run_root.blob_manifest, run_root.blob):
        context.store.delete(key(kind, number, part))
    with BlobWriter(context) as writer:
        write_boundary(writer, kind, number, context.plan.parts[part], values_TH[None], 0.0)


def test_gradients_that_are_not_finite_are_refused_by_layer_and_part(
    context: StageContext,
) -> None:
    gradient_parts(context, (4, [0, 1]))
    spoil(context, "residual-gradients", 4, 1)
    with pytest.raises(CalibrationError, match="layer 3, part 1: the gradients are not finite"):
        gradient_parts(context, (3, [0, 1]))
    assert context.store.head(run_root.gradient_manifest(3, 1)) is None
    assert context.store.head(run_root.gradient_manifest(3, 0)) is not None


def test_activations_that_are_not_finite_on_the_second_way_up_are_refused(
    context: StageContext,
) -> None:
    """The top segment's layers are run by the backward pass alone."""
    spoil(context, "residuals", 4, 1)
    with pytest.raises(
        CalibrationError, match="layer 4, part 1: the model's own activations are not finite"
    ):
        go_back(context, [0, 1])
    assert context.store.head(run_root.activation_manifest(4, 1)) is None
    assert context.store.head(run_root.activation_manifest(4, 0)) is not None


SPARSE = (CURVED, "run.boundary_every=3")


@pytest.mark.parametrize("every", [2, 3, 5, 60])
def test_a_segment_leaves_what_single_layers_leave_and_no_boundary_between(
    every: int, captured: Path, tmp_path: Path
) -> None:
    """To the bytes, the maxima and histograms that scales are made of among them."""
    go_back(copy_of(captured, tmp_path / "single"), [0, 1, 2])
    context = open_run(tmp_path / "segments", CURVED, f"run.boundary_every={every}")
    capture_parts(context, [0, 1, 2])
    go_back(context, [0, 1, 2])
    both = "activations", "gradients"
    assert files(tmp_path / "segments", *both) == files(tmp_path / "single", *both) != {}
    for folder in ("residuals", "residual-gradients"):
        found, every_layer = (
            files(tmp_path / "segments", folder),
            files(tmp_path / "single", folder),
        )
        assert found == {
            name: data
            for name, data in every_layer.items()
            if int(name.split("/")[1].removeprefix("layer-")) % every == 0
        }


HAS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, HAS_GPU])])
def test_second_way_up_sees_what_the_first_saw(device: str, tmp_path: Path) -> None:
    """In bf16, as on GPUs: what a forward pass alone writes of a layer is what a segment writes,
    and so are the facts that scales are made of."""
    contexts = [
        replace(
            open_run(tmp_path / name, "calibration.compute_dtype=bfloat16", *settings),
            device=torch.device(device),
        )
        for name, settings in (("forth", ()), ("back", SPARSE))
    ]
    for context in contexts:
        capture_parts(context, [0, 1, 2])
    go_back(contexts[1], [0, 1, 2])
    for layer in (1, 2, 3, 4):
        for part in (0, 1, 2):
            first, second = (c.blob("activations", layer, part) for c in contexts)
            assert list(first) == list(second)
            assert all(torch.equal(first[name], second[name]) for name in first)
            known, found = (
                ActivationPart.load(c.store, run_root.activation_manifest(layer, part))
                for c in contexts
            )
            for fact in (
                "amax_input",
                "amax_by_expert",
                "input_groups",
                "intermediate_groups",
                "tokens_per_expert",
            ):
                assert getattr(known, fact) == getattr(found, fact)


def test_segments_of_two_lengths_stopped_anywhere_leave_the_same_bytes(
    captured: Path, tmp_path: Path
) -> None:
    """A resumed run may have another run.boundary_every than the one that stopped."""
    go_back(copy_of(captured, tmp_path / "single"), [0, 1, 2])
    root = tmp_path / "resumed"
    deaths = [
        (3, die_at_write, (4, 1), [0, 1]),
        (3, die_at_put, (3, 0), [0, 2]),
        (2, die_at_layer, (2,), [1, 0]),
        (5, die_at_manifest, (2, 2), [2, 1]),
        (3, die_at_write, (1, 0), [0, 2]),
    ]
    for every, die, where, parts in deaths:
        context = open_run(root, CURVED, f"run.boundary_every={every}")
        with pytest.MonkeyPatch.context() as patch:
            die(patch, *where)  # type: ignore[operator]
            with pytest.raises(Death):
                capture_parts(context, parts)
                go_back(context, parts)
    last = open_run(root, *SPARSE)
    capture_parts(last, [0, 1, 2])
    go_back(last, [0, 1, 2])
    both = "activations", "gradients"
    assert files(root, *both) == files(tmp_path / "single", *both) != {}


class Ticking:
    """A clock that is looked at once a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def test_forward_pass_s_seconds_go_with_what_the_backward_pass_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boundaries have the seconds of all layers since the one below, and the lowest layer of each
    segment whose inputs are written has them once more: so nothing that was paid for is missed when
    the boundaries are gone."""
    found = {}
    for every in (1, 2):
        context = open_run(tmp_path / f"run-{every}", CURVED, f"run.boundary_every={every}")
        with monkeypatch.context() as patch:
            patch.setattr(capture, "time", Ticking())
            capture_parts(context, [0, 1, 2])
        found[every] = {
            number: load_part_manifest(context.plan, context.store, "residuals", number, 0).seconds
            for number in context.plan.passes.boundaries
        }
    assert found[1].keys() == {1, 2, 3, 4} and found[2].keys() == {2, 4}
    assert found[2][4] > max(found[1][3], found[1][4])
    key = run_root.blob_manifest("residuals", 2, 0)
    manifest = load_part_manifest(context.plan, context.store, "residuals", 2, 0)
    context.store.put(key, manifest.model_copy(update={"seconds": 1e6}).to_json())
    go_back(context, [0, 1, 2])
    seconds = {
        (layer, part): load_part_manifest(
            context.plan, context.store, "activations", layer, part
        ).seconds
        for layer in context.plan.layers
        for part in range(3)
    }
    assert [place for place, s in seconds.items() if s >= 1e6] == [(2, 0)]


def test_boundary_that_a_segment_starts_from_and_is_gone_is_named(tmp_path: Path) -> None:
    context = open_run(tmp_path / "run", *SPARSE)
    capture_parts(context, [0])
    key = run_root.blob("residual-gradients", 3, 0)
    gradient_parts(context, (HEAD, [0]))
    context.store.delete(key)
    with pytest.raises(CorruptObjectError) as caught:
        gradient_parts(context, (0, [0]))
    assert key in caught.value.keys


def test_infinite_gradients_are_refused(context: StageContext) -> None:
    delta_TH = torch.zeros(128, 256)
    delta_TH[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="layer 2, part 0"), BlobWriter(context) as writer:
        gradients.write_gradients(context, writer, 2, context.plan.parts[0], delta_TH, 0.0)
    assert not files(Path(context.store.uri.removeprefix("file://")), "gradients")


def small_head(seed: int) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(12, 40, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(40, 12, generator=generator))
    return head, torch.randn(3, 7, 12, generator=generator)


def test_slices_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x_BSH = small_head(0)
    whole = head_gradient(head, x_BSH, torch.Generator().manual_seed(3))
    monkeypatch.setattr(derivatives, "TOKENS_PER_HEAD_GRADIENT", 4)
    torch.testing.assert_close(head_gradient(head, x_BSH, torch.Generator().manual_seed(3)), whole)


def test_expected_gradient_at_the_head_is_zero() -> None:
    """Labels come from the model's own distribution, under which the score has mean zero; with any
    other labels it has not."""
    head, x_BSH = small_head(1)
    many_BSH = x_BSH[:1, :1].expand(1, 20_000, 12)
    gradient_TH = head_gradient(head, many_BSH, torch.Generator().manual_seed(0))[0]
    error = gradient_TH.mean(0) / (gradient_TH.std(0) / len(gradient_TH) ** 0.5)
    assert error.abs().max() < 4
    assert gradient_TH.std(0).min() > 0.1


def test_a_step_back_is_the_same_by_micro_batches(context: StageContext) -> None:
    decoder = context.decoder()
    positions, generator = decoder.positions(64), torch.Generator().manual_seed(0)
    x_BSH, above_BSH = (
        torch.randn(3, 64, 256, generator=generator),
        torch.randn(3, 64, 256, generator=generator),
    )
    with layer_or_head(context, decoder, 2) as layer:
        one, three = (
            step_back(layer, [x_BSH], [above_BSH], positions, micro_batch)[0]
            for micro_batch in (1, 3)
        )
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2])
def test_a_step_back_through_a_dense_layer_and_a_mixture_is_autograds(
    context: StageContext, number: int
) -> None:
    """The layer as one graph, experts and all, in one go; two parts of different size."""
    decoder = context.decoder()
    positions, generator = decoder.positions(64), torch.Generator().manual_seed(0)
    entering = [torch.randn(n, 64, 256, generator=generator) for n in (3, 1)]
    above = [torch.randn(n, 64, 256, generator=generator) for n in (3, 1)]
    with layer_or_head(context, decoder, number) as layer:
        found = step_back(layer, entering, above, positions, 2)
        for x_BSH, above_BSH, below_BSH in zip(entering, above, found, strict=True):
            leaf = x_BSH.clone().requires_grad_(True)
            expected = torch.autograd.grad(run_layer(layer, leaf, positions, 4), leaf, above_BSH)[0]
            torch.testing.assert_close(below_BSH, expected, rtol=1e-4, atol=1e-4)


def test_samples_follow_the_distribution() -> None:
    """Chi-square against its 99.9th percentile for 15 degrees of freedom; seed fixed."""
    probabilities_V = torch.logspace(0, -2, 16).flip(0)[
        torch.randperm(16, generator=torch.Generator().manual_seed(1))
    ]
    probabilities_V /= probabilities_V.sum()
    num_draws = 40_000
    labels = sample_labels(probabilities_V.expand(num_draws, 16), torch.Generator().manual_seed(0))
    expected = probabilities_V.double() * num_draws
    statistic = ((torch.bincount(labels, minlength=16) - expected).square() / expected).sum()
    assert 2.0 < statistic < 37.7


def test_samples_of_two_rows_are_independent() -> None:
    labels = sample_labels(torch.full((40_000, 2), 0.5), torch.Generator().manual_seed(0)).view(
        -1, 2
    )
    counts = torch.bincount(2 * labels[:, 0] + labels[:, 1], minlength=4)
    assert ((counts - 5000.0).square() / 5000).sum() < 16.3  # 3 degrees of freedom, 99.9 %


def test_samples_depend_on_the_generator_alone() -> None:
    probabilities = torch.rand(500, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    first, again, other = (
        sample_labels(probabilities, torch.Generator().manual_seed(s)) for s in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_one_hot_row_gives_its_index_whatever_is_drawn(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "rand", lambda n, **_: torch.full((n,), uniform, dtype=torch.float64)
    )
    assert torch.equal(sample_labels(torch.eye(9), torch.Generator()), torch.arange(9))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_range_give_the_first_and_the_last_index(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "rand", lambda n, **_: torch.full((n,), uniform, dtype=torch.float64)
    )
    # sums that are 1 but for rounding
    probabilities = torch.randn(400, 33, generator=torch.Generator().manual_seed(2)).softmax(-1)
    assert (sample_labels(probabilities, torch.Generator()) == (32 if uniform else 0)).all()


def test_impossible_labels_are_never_sampled() -> None:
    probabilities = torch.rand(2000, 30, generator=torch.Generator().manual_seed(3))
    probabilities[:, ::3] = 0
    labels = sample_labels(
        probabilities / probabilities.sum(1, keepdim=True), torch.Generator().manual_seed(0)
    )
    assert labels.min() >= 0
    assert labels.max() < 30
    assert (labels % 3 != 0).all()
