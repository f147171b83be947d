"""What must hold after any fault: the undisturbed bytes, nothing done twice, nothing that points nowhere, nothing that nobody points to."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner

from p48ray import run_root
from p48ray.cli import app
from p48ray.manifest import ActivationPart, Failure, GradientPart, UnitManifest
from p48ray.store.base import Store
from p48ray.store.local import LocalStore
from tests.chaos.harness import NUM_PARTS, NUM_UNITS, Scene
from tests.conftest import TINY

UNIT_LINE = re.compile(r'\{"unit": "([^"]+)", "attempt": "([0-9a-f]+)"')
LOST_UNIT = re.compile(r"compress (L\d+-E\d+-\d+): (?:attempt \d+ failed, it will be tried again|its (?:node|worker) is gone)")


def checkpoint_bytes(store: Store) -> dict[str, str]:
    """Every file of the finished checkpoint -> SHA-256."""
    return {info.key: hashlib.sha256(store.get(info.key)).hexdigest() for info in store.list(run_root.CHECKPOINT)}


def problems_of(store: Store, folder: Path) -> str:
    """What `p48ray verify` says of the finished checkpoint; nothing if it is content. `folder`: where a bucket's checkpoint is copied to."""
    where = folder
    if isinstance(store, LocalStore):
        where = Path(store.path(run_root.CHECKPOINT.rstrip("/")))
    else:
        for info in store.list(run_root.CHECKPOINT):
            path = folder / info.key.removeprefix(run_root.CHECKPOINT)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(info.key))
    result = CliRunner().invoke(app, ["verify", str(where), "--source", str(TINY)])
    return "" if result.exit_code == 0 else f"exit {result.exit_code}: {result.output}"


def units_finished(logs: str) -> Counter[str]:
    """How often a unit was finished, by the workers' lines."""
    return Counter(unit for unit, _ in UNIT_LINE.findall(logs))


def units_repeated(scene: Scene) -> int:
    """Units that were begun again: as the drivers say, and those that died with a driver."""
    with_drivers = sum(hit.in_flight for hit in scene.hits if hit.name == "driver")
    return len(LOST_UNIT.findall(scene.logs)) + with_drivers


def assert_same_end(
    scene: Scene, undisturbed: dict[str, str], folder: Path, redone: Iterable[str] = (), is_contested: bool = False
) -> None:
    """The newest driver succeeds, to the undisturbed checkpoint, with nothing done twice and nothing left over. See assert_whole."""
    assert scene.finish() == 0, (scene.driver.out, scene.driver.err)
    assert checkpoint_bytes(scene.store) == undisturbed
    assert problems_of(scene.store, folder / "copied") == ""
    assert_whole(scene, redone, is_contested)


def assert_whole(scene: Scene, redone: Iterable[str] = (), is_contested: bool = False) -> None:
    """Nothing that was done before a fault was done again, nothing points nowhere, nothing is left that nobody points to.

    Args: redone: units that had to be done again although they had a manifest. is_contested: two drivers may have worked on the same unit.
    """
    store, keys = scene.store, scene.listing()
    units = {unit: UnitManifest.from_json(data, unit) for unit, data in scene.manifests(keys).items()}
    assert len(units) == NUM_UNITS
    shards = {run_root.unit_shard(unit, manifest.attempt): manifest for unit, manifest in units.items()}
    stored = {key for key in keys if key.startswith(run_root.UNITS) and key.endswith(".safetensors")}
    assert stored == (set() if scene.keep == "checkpoint" else set(shards))
    for key in stored:
        data = store.get(key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shards[key].size_bytes, shards[key].sha256), key
    assert_parts_are_whole(scene, keys)
    finished = scene.manifests(keys)
    for hit in scene.hits:
        again = {unit for unit, manifest in hit.done.items() if finished[unit] != manifest}
        assert again <= set(redone), f"{hit.name} in {hit.stage}: done before it and done again: {again}"
    lines = units_finished(scene.logs)
    assert {unit for unit, count in lines.items() if count > 1} <= set(redone), lines
    if not is_contested:
        assert_tries(scene, redone)
    swept = scene.store.sweep(0.0)
    assert swept <= sum(hit.killed for hit in scene.hits), f"{swept} unfinished files"


def assert_parts_are_whole(scene: Scene, keys: frozenset[str]) -> None:
    """Each part of activations and gradients is what its manifest says; or gone, where run.keep says so."""
    for prefix, kind in ((run_root.ACTIVATIONS, ActivationPart), (run_root.GRADIENTS, GradientPart)):
        manifests = {key.removesuffix(".json"): key for key in keys if key.startswith(prefix) and "/part-" in key and key.endswith(".json")}
        data = {key.removesuffix(".arrow"): key for key in keys if key.startswith(prefix) and key.endswith(".arrow")}
        assert len(manifests) == NUM_PARTS
        assert set(data) == (set(manifests) if scene.keep == "all" else set())
        for name, key in data.items():
            digest = hashlib.sha256(scene.store.get(key)).hexdigest()
            assert digest == kind.from_json(scene.store.get(manifests[name]), key).sha256, key
    streams = {key for key in keys if key.startswith((run_root.RESIDUALS, run_root.RESIDUAL_GRADIENTS))}
    assert bool(streams) == (scene.keep == "all"), streams


def assert_tries(scene: Scene, redone: Iterable[str]) -> None:
    """Units were tried again at most as often as some were under way when a fault hit."""
    in_flight = sum(hit.in_flight for hit in scene.hits)
    if isinstance(scene.store, LocalStore):  # folders of attempts stay there when what is in them is deleted
        tries = {path.name: len(list(path.iterdir())) - 1 for path in Path(scene.store.path("units")).iterdir()}
        assert sum(tries.values()) - NUM_UNITS <= in_flight + len(set(redone)), tries


def failures(store: Store) -> list[Failure]:
    """All records of failed attempts."""
    return [Failure.from_json(store.get(info.key), info.key) for info in store.list(run_root.FAILURES)]
