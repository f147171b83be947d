"""What is published and what is not: the folder is looked at before anybody is asked."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.report.report import Report
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.store import LocalStore
from tests.finished.publish_command import REPO_NAME, invoke_publish, published
from tests.finished.test_own_figures import with_benchmarks
from tests.finished.test_requirements import QUALITY
from tests.jobs.command import own_logging
from tests.servers.hub import Hub


@pytest.mark.parametrize("name", [".env", "training_args.bin", "state.PKL", "a/.b/c.json"])
def test_hidden_files_and_pickles_are_refused_though_the_manifest_names_them(
    root: Path, hub: Hub, name: str
) -> None:
    """As a run root may have them that another version of the job has written."""
    store = LocalStore(root / "checkpoint")
    store.put(name, b"whatever")
    manifest = CheckpointManifest.load(store, "p48ray.json")
    files = manifest.file_sha256 | {name: hashlib.sha256(b"whatever").hexdigest()}
    store.put("p48ray.json", manifest.model_copy(update={"file_sha256": files}).sealed().to_json())
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and f"  {name}: a hidden file, or weights" in outcome.err, outcome
    assert not hub.requests


@pytest.fixture(scope="session")
def converted_once(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's checkpoint in sparse storage, as `p48ray convert` writes it. Not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "sparse"
    command = ["convert", str(finished_once / "checkpoint"), str(folder), "--storage", "sparse"]
    with own_logging():
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted_once, tmp_path / "sparse")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_converted_folder_is_published_without_a_run_root(converted: Path, hub: Hub) -> None:
    before = files_of(converted)
    outcome = invoke_publish(None, hub, "--checkpoint", str(converted))
    assert outcome.code == 0, outcome
    assert published(hub) == files_of(converted) == before
    assert b"## Sparse storage" in before["README.md"]
    sent = dict(hub.received)
    again = invoke_publish(None, hub, "--checkpoint", str(converted))
    assert again.code == 0 and dict(hub.received) == sent and len(hub.commits(REPO_NAME)) == 2
    assert sorted(p.name for p in converted.parent.iterdir()) == ["hub", "sparse"], "no records"


def test_beside_a_run_root_it_has_the_runs_records_and_figures(
    converted: Path, root: Path, finished_once: Path, hub: Hub
) -> None:
    store = LocalStore(root)
    report = Report.load(LocalStore(finished_once), run_root.REPORT)
    store.put(run_root.REPORT, report.model_copy(update={"quality": QUALITY}).to_json())
    both = ("--checkpoint", str(converted), "--require")
    assert invoke_publish(root, hub, *both, "kl<=0.06").code == 1 and not hub.requests
    assert invoke_publish(None, hub, *both, "kl<=0.07").code == 1 and not hub.requests
    outcome = invoke_publish(root, hub, *both, "kl<=0.07")
    assert outcome.code == 0, outcome
    assert published(hub) == files_of(converted)
    assert len(list((root / "publish").rglob("*.json"))) == len(
        list(converted.glob("*.safetensors"))
    )
    hub.requests.clear()
    assert invoke_publish(root, hub, *both, "kl<=0.07").code == 0
    assert not [r for r in hub.requests if "commit" in r or "lfs" in r]


def test_benchmarks_of_one_storage_say_nothing_of_the_other(
    converted: Path, root: Path, hub: Hub
) -> None:
    with_benchmarks(root)
    both = ("--checkpoint", str(converted), "--require", "recovery>=0.5")
    outcome = invoke_publish(root, hub, *both)
    assert outcome.code == 1 and "no benchmarks of this checkpoint" in outcome.err, outcome
    assert invoke_publish(root, hub, "--require", "recovery>=0.5").code == 0


def test_folder_of_another_run_is_refused_beside_a_run_root(
    converted: Path, root: Path, hub: Hub
) -> None:
    store = LocalStore(root / "checkpoint")
    manifest = CheckpointManifest.load(store, "p48ray.json")
    other = manifest.model_copy(update={"unit_sha256": {}}).sealed()
    store.put("p48ray.json", other.to_json())
    outcome = invoke_publish(root, hub, "--checkpoint", str(converted))
    assert outcome.code == 2 and "unit_sha256" in outcome.err and not hub.requests


def test_neither_a_run_root_nor_a_folder_is_a_mistake(hub: Hub) -> None:
    outcome = invoke_publish(None, hub)
    assert outcome.code == 2 and "--run-root or --checkpoint" in outcome.err


def cut_header(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def drop_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no index": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "no manifest": lambda folder: (folder / "p48ray.json").unlink(),
    "no shard": drop_shard,
    "header": cut_header,
    "stray shard": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "another config": lambda folder: (folder / "config.json").open("ab").write(b" "),
    "stranger": lambda folder: (folder / "notes.md").write_bytes(b"x"),
    "hidden": lambda folder: (folder / ".env").write_bytes(b"x"),
    "unfinished": lambda folder: (folder / "p48ray-convert.json").write_bytes(b"{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_folder_that_is_not_finished_is_refused(converted: Path, hub: Hub, damage: str) -> None:
    DAMAGES[damage](converted)
    outcome = invoke_publish(None, hub, "--checkpoint", str(converted))
    assert outcome.code == 2, outcome
    assert not hub.requests


def test_bytes_changed_since_are_refused_on_the_way(converted: Path, hub: Hub) -> None:
    path = max(converted.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outcome = invoke_publish(None, hub, "--checkpoint", str(converted))
    assert outcome.code == 2 and f"{path.name}: changed since it was verified" in outcome.err
    assert published(hub) == {}
