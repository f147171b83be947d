"""An expert far louder than its layer is brought down exactly, in original and target alike: the
other experts' intermediates are heard again, and whoever compares with the source knows of it."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from p48ray.finished.verifier import verify_folder
from p48ray.report.inspect import inspect_linear
from p48ray.report.report import Report
from p48ray.run import run_root, scales
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.stages.prepare import Prepared, prepare
from p48ray.store import LocalStore
from tests.checkpoint.tiny_variants import TINY, load_tiny, plain_experts, write_folder
from tests.stages.small_run import configure, run_locally

LAYER, LOUD = 2, 5
STEM = f"language_model.model.layers.{LAYER}.mlp.experts.{LOUD}"
FACTOR = 2.0**14


class Run(NamedTuple):
    """A finished job."""

    prepared: Prepared
    report: Report

    @property
    def checkpoint(self) -> Path:
        return Path(self.prepared.store.uri) / "checkpoint"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model; one expert's up is 2^14 times as large and its down as much smaller, which
    is the same function."""
    tensors = plain_experts(load_tiny())
    tensors[f"{STEM}.up_proj.weight"] = tensors[f"{STEM}.up_proj.weight"] * FACTOR
    tensors[f"{STEM}.down_proj.weight"] = tensors[f"{STEM}.down_proj.weight"] / FACTOR
    config = json.loads((TINY / "config.json").read_text())
    config.pop("quantization_config", None)
    config["text_config"].pop("quantization_config", None)
    folder = tmp_path_factory.mktemp("loud") / "source"
    write_folder(folder, config, tensors)
    for file in TINY.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run(source: Path, root: Path) -> Run:
    prepared = prepare(configure(source, root))
    return Run(prepared, run_locally(prepared))


@pytest.fixture(scope="module")
def shifted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(source, tmp_path_factory.mktemp("shifted") / "run")


@pytest.fixture(scope="module")
def left_loud(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same job, had nobody looked for loud experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales, "loud_experts", lambda *_: {})
        return run(source, tmp_path_factory.mktemp("left") / "run")


@pytest.mark.slow
def test_loud_expert_alone_is_brought_down_and_all_records_say_so(shifted: Run) -> None:
    store, plan = shifted.prepared.store, shifted.prepared.plan
    found = {
        layer: LayerScales.load(store, run_root.layer_scales(layer)).shifts for layer in plan.layers
    }
    shift = found[LAYER][LOUD]
    assert shift >= 4
    assert found == {layer: {LOUD: shift} if layer == LAYER else {} for layer in plan.layers}
    for unit in plan.units:
        own = unit.layer == LAYER and LOUD in unit.experts
        manifest = UnitManifest.load(store, run_root.unit_manifest(unit.id))
        assert manifest.shifts == ({LOUD: shift} if own else {})
    held = CheckpointManifest.load(LocalStore(shifted.checkpoint), "p48ray.json")
    assert held.shifts == {f"{STEM}.up_proj": -shift, f"{STEM}.down_proj": shift}


@pytest.mark.slow
def test_others_of_the_layer_lose_less_than_beside_a_loud_one(shifted: Run, left_loud: Run) -> None:
    errors = []
    for job in (shifted, left_loud):
        units = [u for u in job.prepared.plan.units if u.layer == LAYER]
        manifests = [
            UnitManifest.load(job.prepared.store, run_root.unit_manifest(u.id)) for u in units
        ]
        downs = {
            r.name: r.relative_output_error
            for m in manifests
            for r in m.linears
            if r.name.endswith("down_proj")
        }
        errors.append(downs)
    ours, theirs = errors
    others = [name for name in ours if not name.startswith(f"{STEM}.") and theirs[name] > 0]
    assert len(others) > 10
    assert sum(ours[n] for n in others) < 0.9 * sum(theirs[n] for n in others)
    assert shifted.report.quality is not None and left_loud.report.quality is not None
    assert shifted.report.quality.kl < left_loud.report.quality.kl
    warned = [f for f in left_loud.report.scales if f.layer == LAYER]
    lost = warned[0].calibration[1]
    assert lost.subnormal + lost.zero > 0.001 * lost.groups
    kept = next(f for f in shifted.report.scales if f.layer == LAYER).calibration[1]
    assert kept.subnormal + kept.zero <= 0.001 * kept.groups


@pytest.mark.slow
def test_whoever_compares_with_the_source_takes_the_shift_into_account(
    source: Path, shifted: Run
) -> None:
    store, origin = LocalStore(shifted.checkpoint), LocalStore(source)
    assert verify_folder(store, origin).problems == ()
    manifest = CheckpointManifest.load(store, "p48ray.json")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        name = f"{STEM}.{projection}"
        found = inspect_linear(store, name, origin).relative_weight_error
        assert found == pytest.approx(manifest.relative_weight_errors[name], rel=1e-3)
    try:
        forgotten = manifest.model_copy(update={"shifts": {}}).sealed()
        store.put("p48ray.json", forgotten.to_json())
        problems = "\n".join(verify_folder(store, origin).problems)
    finally:
        store.put("p48ray.json", manifest.to_json())
    assert f"{STEM}.up_proj: relative weight error" in problems
    assert f"{STEM}.down_proj: relative weight error" in problems
