"""Data that turns bad while the job runs, and units that can not be done: mended, or set aside by
name while the rest goes on."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import open_checkpoint
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.store.local import LocalStore
from tests.chaos.checks import assert_same_end, checkpoint_bytes, failures
from tests.chaos.harness import (
    NUM_UNITS,
    PIECES,
    Hit,
    Scene,
    corrupt_a_unit,
    flip_a_bit,
    launch_deadly,
    pick,
    wait_until,
)
from tests.jobs.command import copy_model, narrow_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAX_ATTEMPTS = 3  # run.max_attempts, where nothing else is set
FINGERPRINTED_BYTES = 128 * 2**10  # header included
BF16_NAN = b"\xc0\x7f"


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a file of the source."""

    file: str
    start: int


def scale_of(model: Path, unit: str) -> Spot:
    """A scale in the middle of a unit's first expert."""
    index = open_checkpoint(LocalStore(model))
    layer, expert = int(unit[1:4]), int(unit[6:9])
    entry = index.tensors[
        f"{describe_model(index).expert_linear_name(layer, expert, 'up_proj')}.weight_scale"
    ]
    return Spot(entry.file, entry.start + entry.num_bytes // 4 * 2)


def is_unseen(model: Path, spot: Spot) -> bool:
    """The source's fingerprint looks at both ends of each file."""
    return (
        FINGERPRINTED_BYTES < spot.start < (model / spot.file).stat().st_size - FINGERPRINTED_BYTES
    )


def poison(model: Path, spot: Spot) -> None:
    """Make it a NaN."""
    with (model / spot.file).open("r+b") as file:
        file.seek(spot.start)
        file.write(BF16_NAN)


def min_by_load(scene: Scene, units: list[str]) -> str:
    """Of a layer's units the one with the fewest tokens; any while its layer is not complete."""
    scales = Path(scene.root, run_root.layer_scales(int(units[0][1:4])))
    if not scales.exists():
        return units[-1]
    tokens = json.loads(scales.read_text())["tokens_per_expert"]
    return min(units, key=lambda u: sum(tokens[int(u[6:9]) : int(u[10:13]) + 1]))


def all_units(scene: Scene) -> set[str]:
    return {
        unit.id for unit in RunPlan.from_json(scene.store.get(run_root.PLAN), run_root.PLAN).units
    }


@pytest.mark.chaos_long
def test_shard_corrupted_after_its_manifest_is_made_anew(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    damaged: list[str] = []
    driver = scene.submit()
    scene.hit("bit flip", "compress", scene.rng.uniform(0, 0.6), corrupt_a_unit(damaged))
    before = scene.hits[0].done[damaged[0]]
    assert_same_end(scene, undisturbed, tmp_path, redone=damaged)
    assert scene.manifests()[damaged[0]] != before
    assert "made anew" in driver.out
    assert len(scene.drivers) == 1


@pytest.mark.chaos_long
@pytest.mark.parametrize("folder", ["activations", "gradients"])
def test_part_corrupted_after_its_manifest_is_made_anew(
    folder: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    def strike(scene: Scene) -> int:
        flip_a_bit(
            scene.rng.choice(sorted(Path(scene.root, folder).glob("*/part-*.arrow"))), scene.rng
        )
        return 1

    scene.submit()
    scene.hit("bit flip", "gradients", scene.rng.uniform(0, 0.5), strike)
    assert scene.finish() == 0, (scene.driver.out, scene.driver.err)
    assert_same_end(scene, undisturbed, tmp_path)


def exchange_parts(scene: Scene) -> int:
    """The same part of two layers, each in the other's place, manifests and all."""
    folder = Path(scene.root, "activations")
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("layer-*/part-*.json")):
        parts.setdefault(path.name, []).append(path)
    for name in pick(scene.rng, [name for name, layers in parts.items() if len(layers) > 1]):
        for suffix in (".arrow", ".json"):
            one, other = (path.with_suffix(suffix) for path in parts[name][:2])
            aside = one.with_name("aside")
            one.rename(aside)
            other.rename(one)
            aside.rename(other)
        return 1
    return 0


def double_scales(scene: Scene) -> int:
    """Of a layer that is complete."""
    scales = sorted(Path(scene.root, "activations").glob("layer-*/scales.json"))
    for path in pick(scene.rng, scales):
        said = json.loads(path.read_text())
        other = path.with_name("other")
        other.write_text(json.dumps(said | {n: 2 * said[n] for n in ("gate_up", "down")}))
        other.replace(path)
        return 1
    return 0


def cut_a_manifest(damaged: list[str]) -> Callable[[Scene], int]:
    """Of a unit that is done. damaged: takes its id."""

    def strike(scene: Scene) -> int:
        unit = scene.rng.choice(sorted(scene.manifests()))
        path = Path(scene.root, "units", unit, "manifest.json")
        path.write_bytes(path.read_bytes()[: scene.rng.randrange(200)])
        damaged.append(unit)
        return 1

    return strike


def test_objects_that_are_not_what_their_keys_say_are_made_anew(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    damaged: list[str] = []
    scene.submit()
    # before the backward pass, without which no unit is begun
    scene.hit("parts exchanged", "capture", scene.rng.uniform(0.5, 0.7), exchange_parts)
    scene.hit("scales doubled", "compress", scene.rng.uniform(0, 0.3), double_scales)
    scene.hit("manifest cut", "compress", scene.rng.uniform(0.4, 0.8), cut_a_manifest(damaged))
    assert_same_end(scene, undisturbed, tmp_path, redone=damaged)
    assert "made anew" in scene.logs


@pytest.mark.chaos_long
@pytest.mark.parametrize("folder", ["activations", "gradients"])
def test_manifest_of_a_part_lost_after_its_units_were_done(
    folder: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """As a worker leaves it that was given up, came back, and died between deleting a manifest and
    writing it (capture.write_activations)."""
    scene.submit()
    assert scene.finish() == 0
    scene.rng.choice(sorted(Path(scene.root, folder).glob("*/part-*.json"))).unlink()
    scene.hits.append(Hit("lost manifest", folder, {}, in_flight=0, killed=0))
    scene.submit()
    assert scene.finish() == 0, scene.driver.err
    assert checkpoint_bytes(scene.store) == undisturbed


@pytest.mark.chaos_long
def test_unit_whose_input_is_bad_is_set_aside(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    model = copy_model(tmp_path / "model", narrow_model())
    fingerprint = open_checkpoint(LocalStore(model)).fingerprint
    # units that are under way have no folder yet, and read their experts before they are hit
    scene.settings = {
        "source.checkpoint": str(model),
        "run.prefetch_units": "0",
        "run.layers_in_flight": "4",  # all streams come first
    }
    poisoned: list[str] = []

    def strike(scene: Scene) -> int:
        """A unit of a layer none of whose units is done, the one that its layer gives out last:
        those that are under way have read their experts. Once no stream reads any more."""
        gradients = PIECES["gradients"]
        assert wait_until(lambda: gradients.count(scene.listing()) == gradients.total)
        begun = {path.name[:4] for path in Path(scene.root, "units").iterdir()}
        waiting = sorted(
            unit
            for unit in all_units(scene)
            if unit[:4] not in begun and is_unseen(model, scale_of(model, unit))
        )
        last = [
            u for u in waiting if u == min_by_load(scene, [v for v in waiting if v[:4] == u[:4]])
        ]
        poisoned.extend(pick(scene.rng, last))
        for unit in poisoned:
            poison(model, scale_of(model, unit))
        return len(poisoned)

    driver = scene.submit()
    scene.hit("NaN in the source", "compress", 0.0, strike)
    (unit,) = poisoned
    assert open_checkpoint(LocalStore(model)).fingerprint == fingerprint
    assert scene.finish() == 2, (driver.out, driver.err)
    expert = f"layers.{int(unit[1:4])}.mlp.experts.{int(unit[6:9])}.up_proj.weight_scale"
    assert f"{expert}: expected finite values, found 1 of" in driver.err
    assert set(scene.manifests()) == all_units(scene) - {unit}
    (record,) = failures(scene.store)
    assert (record.stage, record.task) == ("compress", unit)
    assert "compress_unit" in record.traceback and "SourceError" in record.error
    shutil.copy(narrow_model() / scale_of(model, unit).file, model)
    scene.submit()
    assert_same_end(scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
def test_unit_that_kills_its_workers_is_set_aside(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    unit = scene.rng.choice(["L001-E000-003", "L003-E008-011", "L004-E012-015"])
    start, scene.start = scene.start, launch_deadly(unit)
    driver = scene.submit()
    assert scene.finish() == 1, (driver.out, driver.err)
    assert (
        f"compress: 1 of {NUM_UNITS} tasks failed" in driver.err
        and f"  {unit}: WorkerLostError: " in driver.err
    )
    scene.hits.append(
        Hit(
            "deadly unit",
            "compress",
            scene.manifests(),
            in_flight=MAX_ATTEMPTS,
            killed=MAX_ATTEMPTS,
        )
    )
    assert Counter(record.task for record in failures(scene.store)) == {unit: MAX_ATTEMPTS}
    assert set(scene.manifests()) == all_units(scene) - {unit}
    scene.start = start
    scene.submit()
    assert_same_end(scene, undisturbed, tmp_path)
