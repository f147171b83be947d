"""What must hold after any fault: the undisturbed bytes, nothing done twice, nothing that points
nowhere, nothing that nobody points to."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.run import run_root
from p48ray.run.manifest import (
    ActivationPart,
    BoundaryPart,
    Failure,
    GradientPart,
    PartManifest,
    UnitManifest,
)
from p48ray.stages.blobs import WRITERS
from p48ray.store.base import Store
from p48ray.store.local import LocalStore
from tests.chaos.harness import NUM_PARTS, NUM_UNITS, Scene
from tests.jobs.command import narrow_model

BLOBS: dict[str, type[PartManifest]] = {
    "activations": ActivationPart,
    "gradients": GradientPart,
    "residuals": BoundaryPart,
    "residual-gradients": BoundaryPart,
}
UNIT_LINE = re.compile(r'\{"unit": "([^"]+)", "attempt": "([0-9a-f]+)"')
LOST_UNIT = re.compile(
    r"compress (L\d+-E\d+-\d+): (?:attempt \d+ failed, it will be tried again|its (?:node|worker)"
    r" is gone)"
)


def checkpoint_bytes(store: Store) -> dict[str, str]:
    """Every file of the finished checkpoint -> SHA-256."""
    return {
        info.key: hashlib.sha256(store.get(info.key)).hexdigest()
        for info in store.list(run_root.CHECKPOINT)
    }


def problems_of(store: Store, folder: Path) -> str:
    """What `p48ray verify` says of the finished checkpoint; nothing if it is content. `folder`:
    where a bucket's checkpoint is copied to."""
    where = folder
    if isinstance(store, LocalStore):
        where = Path(store.path(run_root.CHECKPOINT.rstrip("/")))
    else:
        for info in store.list(run_root.CHECKPOINT):
            path = folder / info.key.removeprefix(run_root.CHECKPOINT)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(info.key))
    result = CliRunner().invoke(app, ["verify", str(where), "--source", str(narrow_model())])
    return "" if result.exit_code == 0 else f"exit {result.exit_code}: {result.output}"


def units_finished(logs: str) -> Counter[str]:
    """How often a unit was finished, by the workers' lines."""
    return Counter(unit for unit, _ in UNIT_LINE.findall(logs))


def units_repeated(scene: Scene) -> int:
    """Units that were begun again: as the drivers say, and those that died with a driver."""
    with_drivers = sum(hit.in_flight for hit in scene.hits if hit.name == "driver")
    return len(LOST_UNIT.findall(scene.logs)) + with_drivers


def assert_same_end(
    scene: Scene,
    undisturbed: dict[str, str],
    folder: Path,
    redone: Iterable[str] = (),
    is_contested: bool = False,
) -> None:
    """The newest driver succeeds, to the undisturbed checkpoint, with nothing done twice and
    nothing left over. See assert_whole."""
    assert scene.finish() == 0, (scene.driver.out, scene.driver.err)
    assert checkpoint_bytes(scene.store) == undisturbed
    assert problems_of(scene.store, folder / "copied") == ""
    assert_whole(scene, redone, is_contested)


def assert_whole(scene: Scene, redone: Iterable[str] = (), is_contested: bool = False) -> None:
    """Nothing that was done before a fault was done again, nothing points nowhere, nothing is left
    that nobody points to.

    Args:
        redone: units that had to be done again although they had a manifest.
        is_contested: two drivers may have worked on the same unit.
    """
    store, keys = scene.store, scene.listing()
    units = {
        unit: UnitManifest.from_json(data, unit) for unit, data in scene.manifests(keys).items()
    }
    assert len(units) == NUM_UNITS
    shards = {
        run_root.unit_shard(unit, manifest.attempt): manifest for unit, manifest in units.items()
    }
    stored = {
        key for key in keys if key.startswith(run_root.UNITS) and key.endswith(".safetensors")
    }
    assert stored == (set() if scene.keep == "checkpoint" else set(shards))
    for key in stored:
        data = store.get(key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (
            shards[key].size_bytes,
            shards[key].sha256,
        ), key
    assert_parts_are_whole(scene, keys)
    finished = scene.manifests(keys)
    for hit in scene.hits:
        again = {unit for unit, manifest in hit.done.items() if finished[unit] != manifest}
        assert again <= set(redone), (
            f"{hit.name} in {hit.stage}: done before it and done again: {again}"
        )
    lines = units_finished(scene.logs)
    assert {unit for unit, count in lines.items() if count > 1} <= set(redone), lines
    if not is_contested:
        assert_tries(scene, redone)
    swept = scene.store.sweep(0.0)
    assert swept <= sum(hit.killed * WRITERS for hit in scene.hits), f"{swept} unfinished files"


def assert_parts_are_whole(scene: Scene, keys: frozenset[str]) -> None:
    """Each blob is what its manifest says and none is without one. Where run.keep says so only the
    manifests of activations and gradients are left."""
    for kind, record in BLOBS.items():
        manifests, data = blob_names(keys, kind)
        if record is BoundaryPart:
            assert bool(data) == (scene.keep == "all"), kind
            assert data == manifests, kind
        else:
            assert len(manifests) == NUM_PARTS
            assert data == (manifests if scene.keep == "all" else set())
        assert_blobs_are_whole(scene.store, data, record)


def blob_names(keys: Iterable[str], kind: str) -> tuple[set[str], set[str]]:
    """Parts that have a manifest, and parts that have a blob: their keys without the ending."""
    parts = [key for key in keys if key.startswith(f"{kind}/") and "/part-" in key]
    manifests = {key.removesuffix(".json") for key in parts if key.endswith(".json")}
    return manifests, {key.removesuffix(".arrow") for key in parts if key.endswith(".arrow")}


def assert_blobs_are_whole(store: Store, names: Iterable[str], record: type[PartManifest]) -> None:
    """Size and digest are those of the manifest."""
    for name in names:
        data, manifest = (
            store.get(f"{name}.arrow"),
            record.from_json(store.get(f"{name}.json"), name),
        )
        assert (len(data), hashlib.sha256(data).hexdigest()) == (
            manifest.size_bytes,
            manifest.sha256,
        ), name


def assert_tries(scene: Scene, redone: Iterable[str]) -> None:
    """Units were tried again at most as often as some were under way when a fault hit."""
    in_flight = sum(hit.in_flight for hit in scene.hits)
    # folders of attempts stay there when what is in them is deleted
    if isinstance(scene.store, LocalStore):
        tries = {
            path.name: len(list(path.iterdir())) - 1
            for path in Path(scene.store.path("units")).iterdir()
        }
        assert sum(tries.values()) - NUM_UNITS <= in_flight + len(set(redone)), tries


def failures(store: Store) -> list[Failure]:
    """All records of failed attempts."""
    return [
        Failure.from_json(store.get(info.key), info.key) for info in store.list(run_root.FAILURES)
    ]
