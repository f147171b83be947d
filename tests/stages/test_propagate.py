"""The stream behind compressed layers, against the whole model by transformers with the stored
experts in it, and what it does about bad shards."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p48ray.errors import CorruptObjectError
from p48ray.model.experts import RoutedInputs
from p48ray.run import run_root
from p48ray.run.manifest import ActivationPart, LayerScales, UnitManifest
from p48ray.run.plan import SequencePart
from p48ray.run.scales import write_layer_scales
from p48ray.stages import propagate
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import capture_parts
from p48ray.stages.propagate import propagate_parts
from p48ray.unit.compress import compress_unit
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY
from tests.reference import whole_model
from tests.stages.slow_nvfp4 import decode_weights
from tests.stages.test_capture import open_run, token_ids
from tests.stages.test_evaluate import PROJECTIONS, w4a4_forward

pytestmark = pytest.mark.slow

SETTINGS = (
    "calibration.propagate=compressed",
    "compression.output_curvature=false",
    "compression.solver=round_to_nearest",
    "compression.refine_steps=0",
    "run.experts_per_unit=8",
)
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def take_turns(context: StageContext, *layers: int) -> None:
    """Capture and compress layers one after the other."""
    for layer in layers:
        propagate_parts(context, (layer, [0, 1, 2]))
        write_layer_scales(context.plan, context.store, layer)
        for unit in context.plan.units:
            if unit.layer == layer:
                compress_unit(context, unit)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root in which layers 1 and 2 are compressed; copied, never used itself."""
    root = tmp_path_factory.mktemp("turns") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        torch.set_num_threads(1)
        take_turns(open_run(root, *SETTINGS), 1, 2)
    return root


@pytest.fixture
def context(two_layers: Path, tmp_path: Path) -> StageContext:
    shutil.copytree(two_layers, tmp_path / "run")
    return open_run(tmp_path / "run", *SETTINGS)


def stored_experts(context: StageContext, layer: int) -> list[dict[str, Tensor]]:
    """A layer's experts from the shards that manifests name, by tables of the tests' own."""
    tensors: dict[str, Tensor] = {}
    for unit in (u for u in context.plan.units if u.layer == layer):
        manifest = UnitManifest.load(context.store, run_root.unit_manifest(unit.id))
        tensors |= whole_model.read_all(
            Path(context.store.uri)
            / run_root.unit_shard(unit.id, manifest.attempt).rpartition("/")[0]
        )
    stem = f"language_model.model.layers.{layer}.mlp.experts"
    return [
        {
            p: decode_weights({s: tensors[f"{stem}.{e}.{p}.{s}"] for s in SUFFIXES}).float()
            for p in PROJECTIONS
        }
        for e in range(16)
    ]


def spied(patch: pytest.MonkeyPatch) -> dict[int, RoutedInputs]:
    """What the next layer's experts see, by part, before the cast."""
    raw: dict[int, RoutedInputs] = {}
    write = propagate.write_activations

    def spy(
        context: StageContext,
        writer: BlobWriter,
        layer: int,
        part: SequencePart,
        seen: RoutedInputs,
        start: float,
    ) -> None:
        raw[part.part] = RoutedInputs(*(t.clone() for t in seen))
        write(context, writer, layer, part, seen, start)

    patch.setattr(propagate, "write_activations", spy)
    return raw


@pytest.mark.parametrize("drop", [0, 1])
def test_inputs_are_the_whole_models_with_the_stored_experts_in_the_layers_below(
    context: StageContext, drop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 1 and 2 compressed under W4A4, 3 not yet; from the stored boundary and (drop) all the
    way from the embedding."""
    if drop:
        shutil.rmtree(Path(context.store.uri) / run_root.COMPRESSED_RESIDUALS)
    raw = spied(monkeypatch)
    propagate_parts(context, (3, [0, 1, 2]))
    model = whole_model.load(TINY)
    source = whole_model.run_and_record(model, token_ids(context).long())[1][3].hidden_TH
    for layer in (1, 2):
        scales = LayerScales.load(context.store, run_root.layer_scales(layer))
        model.model.layers[layer].mlp.experts.forward = w4a4_forward(
            stored_experts(context, layer), scales.gate_up, scales.down, 16
        )
    want = whole_model.run_and_record(model, token_ids(context).long())[1][3].hidden_TH
    ours = torch.cat([raw[p].hidden_TH for p in (0, 1, 2)])
    # A rounding tie that falls the other way moves a token a little; the compression moves it by
    # far more.
    assert (ours - want).norm() < 0.02 * (source - want).norm()
    assert (source - want).norm() > 0.01 * source.norm()


def test_first_turn_sees_what_the_source_sees(tmp_path: Path) -> None:
    dense, turn = (
        open_run(tmp_path / "dense", *SETTINGS, "calibration.propagate=dense"),
        open_run(tmp_path / "turn", *SETTINGS),
    )
    capture_parts(dense, [0, 1, 2])
    manifests = propagate_parts(turn, (1, [0, 1, 2]))
    ours, its = (context.blob("activations", 1, 2) for context in (turn, dense))
    assert list(ours) == list(its) and all(torch.equal(ours[name], its[name]) for name in its)
    theirs = [
        ActivationPart.load(dense.store, run_root.activation_manifest(1, p)) for p in (0, 1, 2)
    ]
    assert [(m.amax_input, m.amax_by_expert) for m in manifests] == [
        (m.amax_input, m.amax_by_expert) for m in theirs
    ]


def test_parts_give_the_same_bytes_together_and_alone(
    context: StageContext, two_layers: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_layers, tmp_path / "alone")
    alone = open_run(tmp_path / "alone", *SETTINGS)
    propagate_parts(context, (3, [0, 1, 2]))
    for part in (2, 0, 1):
        propagate_parts(alone, (3, [part]))
    for key in [run_root.activation_part(3, p) for p in (0, 1, 2)] + [
        run_root.blob("compressed-residuals", 3, p) for p in (0, 1, 2)
    ]:
        assert context.store.get(key) == alone.store.get(key), key


def held(context: StageContext) -> set[str]:
    """Boundaries behind compressed layers; each has its manifest."""
    keys = {info.key for info in context.store.list(run_root.COMPRESSED_RESIDUALS)}
    blobs = {key for key in keys if key.endswith(".arrow")}
    assert keys - blobs == {run_root.manifest_of(key) for key in blobs}
    return blobs


def test_each_turn_starts_from_the_last_boundary_and_leaves_the_next(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    boundary = StageContext.boundary
    monkeypatch.setattr(
        StageContext,
        "boundary",
        lambda self, *place: read.append(run_root.blob(*place)) or boundary(self, *place),
    )
    propagate_parts(context, (3, [0, 1]))
    assert read == [run_root.blob("compressed-residuals", 2, p) for p in (0, 1)]
    assert propagate_parts(context, (3, [0, 1])) == []
    assert held(context) == {
        run_root.blob("compressed-residuals", b, p) for b in (1, 2) for p in (0, 1, 2)
    } | {run_root.blob("compressed-residuals", 3, p) for p in (0, 1)}


def test_boundary_goes_once_the_next_is_stored_where_not_all_is_kept(
    two_layers: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_layers, tmp_path / "run")
    context = open_run(tmp_path / "run", *SETTINGS, "run.keep=units")
    propagate_parts(context, (3, [0, 1, 2]))
    assert held(context) == {
        run_root.blob("compressed-residuals", b, p) for b in (1, 3) for p in (0, 1, 2)
    }


def damage_shard(context: StageContext, how: Callable[[Path], None]) -> tuple[str, str]:
    unit = next(u for u in context.plan.units if u.layer == 2)
    manifest_key = run_root.unit_manifest(unit.id)
    key = run_root.unit_shard(unit.id, UnitManifest.load(context.store, manifest_key).attempt)
    how(Path(context.store.uri) / key)
    return manifest_key, key


@pytest.mark.parametrize(
    "how",
    [flip_a_bit, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])],
    ids=["flipped", "gone", "shorter"],
)
def test_shard_that_is_not_what_its_manifest_says_is_named_to_be_made_anew(
    context: StageContext, how: Callable[[Path], None]
) -> None:
    keys = damage_shard(context, how)
    with pytest.raises(CorruptObjectError) as caught:
        propagate_parts(context, (3, [0, 1, 2]))
    assert caught.value.keys == keys
    assert keys[0] in str(caught.value)


def test_boundary_that_is_not_what_was_written_is_named_to_be_made_anew(
    context: StageContext,
) -> None:
    key = run_root.blob("compressed-residuals", 2, 1)
    flip_a_bit(Path(context.store.uri) / key)
    with pytest.raises(CorruptObjectError) as caught:
        propagate_parts(context, (3, [0, 1, 2]))
    assert caught.value.keys == (run_root.manifest_of(key), key)
    for name in caught.value.keys:
        context.store.delete(name)
    propagate_parts(context, (3, [1]))
    assert context.boundary("compressed-residuals", 2, 1).shape[0] == 2 * 64, (
        "made again from the one below"
    )


def test_mixture_that_the_plan_does_not_compress_stays_the_sources(tmp_path: Path) -> None:
    """A pilot of layer 2: its inputs are the source's own."""
    pilot = "run.layers=[2]"
    dense = open_run(tmp_path / "dense", *SETTINGS, pilot, "calibration.propagate=dense")
    turn = open_run(tmp_path / "turn", *SETTINGS, pilot)
    capture_parts(dense, [0])
    propagate_parts(turn, (2, [0]))
    ours, its = (context.blob("activations", 2, 0) for context in (turn, dense))
    assert list(ours) == list(its) and all(torch.equal(ours[name], its[name]) for name in its)
