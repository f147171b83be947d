"""What a run does about objects of its run root that are not what their keys say: moved, cut,
changed, or left over from other settings. The same command ends with the same checkpoint, and
`p48ray doctor` says beforehand what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from p48ray.errors import CorruptObjectError, PlanMismatchError, VerificationError
from p48ray.run import doctor, run_root
from p48ray.runner.pipeline import Job
from p48ray.stages.prepare import prepare
from p48ray.store import LocalStore
from tests.stages.small_run import SmallRun, configure, run_locally

LAYERS = (1, 2)
FIRST = "units/L001-E000-007"


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def exchanged(first: Path, second: Path) -> None:
    """Two files, or folders, each in the other's place."""
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def opened_again(root: Path, *layers: int) -> None:
    """Units of some layers as if nobody had done them; what follows from units too."""
    for folder in (root / "units").iterdir():
        if int(folder.name[1:4]) in layers:
            shutil.rmtree(folder)
    stitched_again(root)


def stitched_again(root: Path) -> None:
    for name in ("checkpoint", "verification", "evaluation", "report"):
        shutil.rmtree(root / name)


def parts_exchanged(kind: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        opened_again(root, 1)
        for suffix in ("json", "arrow"):
            one, other = (root / kind / f"layer-00{n}" / f"part-0000.{suffix}" for n in LAYERS)
            exchanged(one, other)

    return damage


def scales_doubled(root: Path) -> None:
    opened_again(root, 1)
    path = root / "activations/layer-001/scales.json"
    said = json.loads(path.read_text())
    edited(path, gate_up=2 * said["gate_up"], down=2 * said["down"])


def scales_exchanged(root: Path) -> None:
    opened_again(root, 1)
    exchanged(*(root / f"activations/layer-00{n}/scales.json" for n in LAYERS))


def part_manifest_cut(root: Path) -> None:
    opened_again(root, 1)
    path = root / "activations/layer-001/part-0001.json"
    path.write_bytes(path.read_bytes()[:60])


def part_manifest_cut_before_scales(root: Path) -> None:
    part_manifest_cut(root)
    (root / "activations/layer-001/scales.json").unlink()


def unit_manifest(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        stitched_again(root)
        change(root / FIRST / "manifest.json")

    return damage


def units_exchanged(root: Path) -> None:
    stitched_again(root)
    exchanged(root / FIRST, root / "units/L002-E000-007")


def unit_of_other_scales(root: Path) -> None:
    """Made before the layer's scales were made again from other parts."""
    stitched_again(root)
    path = root / FIRST / "manifest.json"
    edited(path, input_global_scales=[1.0, 1.0])


def unit_of_other_shifts(root: Path) -> None:
    stitched_again(root)
    edited(root / FIRST / "manifest.json", shifts={"3": 2})


def token_flipped(root: Path) -> None:
    opened_again(root, 1)
    for folder in ("activations", "residuals"):
        shutil.rmtree(root / folder)
    flipped(root / run_root.TOKENS)


def tokens_of_others(root: Path) -> None:
    token_flipped(root)
    edited(root / "calibration/tokens.json", owner="f" * 64)


def verdict(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        shutil.rmtree(root / "report")
        change(root / "verification/model-00001-of-00006.json")

    return damage


def verdicts_exchanged(root: Path) -> None:
    shutil.rmtree(root / "report")
    exchanged(*(root / f"verification/model-0000{n}-of-00006.json" for n in (1, 2)))


def stitched_shard_flipped(root: Path) -> None:
    for name in ("verification", "report"):
        shutil.rmtree(root / name)
    flipped(root / "checkpoint/model-00001-of-00006.safetensors")


def evaluation_exchanged(root: Path) -> None:
    shutil.rmtree(root / "report")
    (folder,) = (root / "evaluation").iterdir()
    exchanged(folder / "part-0000.json", folder / "part-0001.json")


def evaluation_of_others(root: Path) -> None:
    shutil.rmtree(root / "report")
    (folder,) = (root / "evaluation").iterdir()
    path = folder / "part-0000.json"
    cells = [cell | {"kl": 1000.0} for cell in json.loads(path.read_text())["cells"]]
    edited(path, evaluation="0123456789abcdef", cells=cells)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "activations of two layers exchanged, manifests and all": parts_exchanged("activations"),
    "scales.json doubled": scales_doubled,
    "scales.json of two layers exchanged": scales_exchanged,
    "manifest of a part cut short": part_manifest_cut,
    "manifest of a part cut short before scales.json was made": part_manifest_cut_before_scales,
    "unit manifest cut short": unit_manifest(cut),
    "unit manifest empty": unit_manifest(lambda path: path.write_bytes(b"")),
    "unit manifest of another plan": unit_manifest(
        lambda path: edited(path, units_digest="f" * 64)
    ),
    "two units exchanged, manifests and all": units_exchanged,
    "unit of other scales": unit_of_other_scales,
    "unit with an expert that its layer does not bring down": unit_of_other_shifts,
    "one bit flipped in the packed texts": token_flipped,
    "packed texts of others": tokens_of_others,
    "verdict cut short": verdict(cut),
    "verdict of another plan": verdict(lambda path: edited(path, plan_digest="f" * 64)),
    "verdicts of two shards exchanged": verdicts_exchanged,
    "one bit flipped in a stitched shard": stitched_shard_flipped,
    "evaluation's parts exchanged": evaluation_exchanged,
    "evaluation part of another evaluation": evaluation_of_others,
}
UNSEEN_BY_DOCTOR = {"one bit flipped in a stitched shard"}  # verify reads those bytes


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (root / "checkpoint").iterdir()
        if path.name != "README.md"  # says when it was made
    }


@pytest.fixture
def copied(finished: SmallRun, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    return root


@pytest.mark.parametrize("name", DAMAGES)
def test_same_command_mends_what_is_not_what_its_key_says(
    name: str, copied: Path, finished: SmallRun
) -> None:
    DAMAGES[name](copied)
    store = LocalStore(copied)
    unsound = doctor.diagnose(store).unsound
    assert bool(unsound) == (name not in UNSEEN_BY_DOCTOR), unsound
    report = run_locally(prepare(configure(finished.source, copied)))
    assert files_of(copied) == files_of(finished.root)
    assert report.quality == finished.report.quality
    left = {key.rpartition("/")[0] for key in doctor.diagnose(store).keys}
    assert left <= {"activations/layer-002"}, "of a layer that is done nothing is made again"


@pytest.mark.parametrize("name", [n for n in DAMAGES if n not in UNSEEN_BY_DOCTOR])
def test_what_doctor_names_is_all_that_has_to_go(name: str, copied: Path) -> None:
    DAMAGES[name](copied)
    store = LocalStore(copied)
    found = doctor.diagnose(store)
    for key in found.keys:
        store.delete(key)
    assert found.unsound, "there is something to delete"
    assert found.made_anew, "the next run has something to make"
    assert doctor.diagnose(store).unsound == ()


def test_sound_run_root_has_nothing_unsound(finished: SmallRun) -> None:
    found = doctor.diagnose(LocalStore(finished.root))
    assert (found.unsound, found.unknown, found.made_anew) == ((), (), ())
    assert found.num_checked > len(finished.prepared.plan.units)


def test_unit_that_verification_refuses_is_named_and_doctor_deletes_it(
    copied: Path, finished: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device with a fault would make it: the shard is what its manifest says, and wrong."""
    stitched_again(copied)
    unit = finished.prepared.plan.units[0]
    store, key = LocalStore(copied), run_root.unit_manifest(unit.id)
    manifest = json.loads(store.get(key))
    linears = [r | {"relative_weight_error": 0.5} for r in manifest["linears"][:1]]
    edited(copied / key, linears=[*linears, *manifest["linears"][1:]])
    prepared = prepare(configure(finished.source, copied))
    with pytest.raises(VerificationError) as caught:
        run_locally(prepared)
    assert key in str(caught.value)
    assert "p48ray doctor RUN_ROOT --fix" in str(caught.value)
    (found,) = doctor.diagnose(store).unsound
    assert key in found.delete
    assert "checkpoint/model-00001-of-00006.safetensors" in found.delete
    for name in found.delete:
        store.delete(name)
    run_locally(prepare(configure(finished.source, copied)))
    assert files_of(copied) == files_of(finished.root)


def test_driver_that_was_taken_over_does_not_take_the_run_root_back(
    copied: Path, finished: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds a corrupt object after another plan with the same units came."""
    pilot = prepare(configure(finished.source, copied, "run.layers=[1]")).plan.to_json()
    shutil.rmtree(copied / "checkpoint")

    def overtaken(job: Job) -> None:
        job.store.put(run_root.PLAN, pilot)
        raise CorruptObjectError("bad", "units/none")

    monkeypatch.setattr(Job, "run", overtaken)
    with pytest.raises(PlanMismatchError, match="another driver took the run root over"):
        run_locally(prepare(configure(finished.source, copied)))
    assert (copied / run_root.PLAN).read_bytes() == pilot
