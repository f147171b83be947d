"""The whole job from a repository on the Hub: mirrored once, resumed without copying again, and the
same bytes as from a folder."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.store import HubStore, LocalStore, open_store
from tests.conftest import TINY
from tests.finished.publish_command import files_with
from tests.jobs.command import (
    ROUNDED,
    Outcome,
    arguments,
    copy_model,
    invoke,
    launch,
    narrow_model,
    snapshot,
)
from tests.servers.hub import EDGE_BYTES, MODEL, TOKEN, Fault, Hub, tiny_files
from tests.servers.s3 import BUCKET, Server

SHARDS = [f"model-0000{i}-of-000003.safetensors" for i in (1, 2, 3)]
NAMED = {"output.base_model": "owner/tiny"}  # so that the card of a folder names the same model


def settings(place: str = "hf://owner/tiny@main", **more: str) -> dict[str, str]:
    return (
        ROUNDED
        | NAMED
        | {"source.checkpoint": place}
        | {k.replace("__", "."): v for k, v in more.items()}
    )


def run(root: Path | str, place: str = "hf://owner/tiny@main", *args: str, **more: str) -> Outcome:
    return invoke(*arguments(root, settings(place, **more)), *args)


def finish(root: Path | str, place: str = "hf://owner/tiny@main", **more: str) -> None:
    outcome = run(root, place, **more)
    assert outcome.code == 0, outcome


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of the same run from a folder."""
    folder = tmp_path_factory.mktemp("local")
    finish(folder / "run", str(copy_model(folder / "model", narrow_model())))
    return folder / "run"


def mirror_markers(root: Path) -> dict[str, bytes]:
    return {p.name.removesuffix(".json"): p.read_bytes() for p in (root / "mirror").glob("*.json")}


def copied() -> set[str]:
    """What the rule of stages.mirror takes of the sample's repository."""
    return set(tiny_files()) - {
        ".gitattributes",
        "original/model.safetensors",
        "figures/logo.png",
        "pytorch_model.bin",
        "TRAINING.md",
    }


def assert_same_checkpoint(root: Path, local: Path) -> None:
    """Every file, but for the card: that of a run from the Hub names the commit."""
    ours, theirs = snapshot(root / "checkpoint"), snapshot(local / "checkpoint")
    assert ours.pop("README.md") != theirs.pop("README.md") and ours == theirs


def test_run_from_the_hub_ends_in_the_bytes_of_a_run_from_a_folder(
    hub: Hub, tmp_path: Path, local: Path
) -> None:
    commit = hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    outcome = run(root)
    assert outcome.code == 0, outcome
    assert_same_checkpoint(root, local)
    assert commit in (root / "checkpoint" / "README.md").read_text()
    assert {p.name: p.read_bytes() for p in (root / "source").iterdir()} == {
        n: tiny_files()[n] for n in copied()
    }
    assert set(mirror_markers(root)) == copied()
    plan = RunPlan.load(LocalStore(root), "plan.json")
    assert plan.config.source.checkpoint == f"hf://owner/tiny@{commit}"
    assert plan.revisions == {"hf://owner/tiny@main": commit}
    assert plan.digest == RunPlan.load(LocalStore(local), "plan.json").digest, (
        "a folder with the same files is the same source"
    )
    for words in ("mirrored first", f"{len(copied())} files, ", commit, "mirror"):
        assert words in outcome.out
    for shard in SHARDS:  # whole once, and headers and edges for the plan
        assert len(tiny_files()[shard]) <= hub.sent[shard] < len(tiny_files()[shard]) + EDGE_BYTES


def test_dry_run_reads_headers_only_and_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(MODEL, tiny_files())
    outcome = run(
        tmp_path / "run",
        "hf://owner/tiny",
        "--dry-run",
        calibration__documents="hf://datasets/nobody/nothing",
    )
    assert outcome.code == 0, outcome
    assert commit in outcome.out and "mirrored first" in outcome.out
    assert not list(tmp_path.glob("run*"))
    assert all(hub.sent[s] < EDGE_BYTES for s in SHARDS)
    assert not any("datasets" in request for request in hub.requests), (
        "a dry run does not touch the texts"
    )


def test_finished_run_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    finish(root)
    before = snapshot(root / "checkpoint")
    hub.close()
    finish(root)
    assert snapshot(root / "checkpoint") == before


def test_resume_keeps_to_the_commit_though_the_branch_has_moved(
    hub: Hub, tmp_path: Path, local: Path
) -> None:
    commit = hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    # the mirror ends without this file
    hub.faults += [Fault(f"OBJECT {SHARDS[1]}", 404, is_whole=True)] * 9
    outcome = run(root)
    assert outcome.code == 1 and "mirror: 1 of" in outcome.err, outcome
    hub.faults.clear()
    before = mirror_markers(root)
    assert set(before) == copied() - {SHARDS[1]}
    hub.commit(MODEL, dict.fromkeys(tiny_files(), b"{}"))
    sent = hub.sent.copy()
    outcome = run(root)
    assert outcome.code == 0, outcome
    assert f"commit {commit}" in outcome.out
    after = mirror_markers(root)
    assert {n: after[n] for n in before} == before, "a finished file is not copied again"
    assert hub.sent[SHARDS[0]] - sent[SHARDS[0]] < EDGE_BYTES
    assert_same_checkpoint(root, local)


def test_another_revision_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    finish(root)
    second = hub.commit(MODEL, tiny_files() | {"LICENSE": b"other terms"}, branch="next")
    outcome = run(root, "hf://owner/tiny@next")
    assert outcome.code == 2, outcome
    for words in (
        "this run root belongs to another plan: source.checkpoint",
        f"hf://owner/tiny@{second}",
        f"hf://owner/tiny@{first}",
    ):
        assert words in outcome.err
    finish(root, f"hf://owner/tiny@{first}")  # the same commit in other words is the same source


def test_damaged_mirror_is_copied_again_file_by_file(hub: Hub, tmp_path: Path) -> None:
    hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    finish(root)
    file, marker = root / "source" / SHARDS[2], root / "mirror" / f"{SHARDS[2]}.json"
    damages: dict[str, Callable[[], object]] = {
        "absent": file.unlink,
        "cut": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "marker": lambda: marker.write_text("{"),
        "marker of another": lambda: marker.write_text(
            json.dumps(json.loads(marker.read_text()) | {"sha256": "0" * 64})
        ),
    }
    for damage, strike in damages.items():
        strike()
        before, sent = mirror_markers(root), hub.sent.copy()
        finish(root)
        assert file.read_bytes() == tiny_files()[SHARDS[2]], damage
        after = mirror_markers(root)
        assert {n for n in after if after[n] != before[n]} == {SHARDS[2]}, damage
        assert hub.sent[SHARDS[2]] - sent[SHARDS[2]] >= len(tiny_files()[SHARDS[2]]), damage


def test_download_that_is_corrupted_once_is_made_again(
    hub: Hub, tmp_path: Path, local: Path
) -> None:
    hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    # not in the header or the edges, which the plan's fingerprint covers
    middle = len(tiny_files()[SHARDS[0]]) // 2
    hub.faults.append(Fault(f"OBJECT {SHARDS[0]}", flip=middle, is_whole=True))
    finish(root)
    assert not hub.faults
    assert_same_checkpoint(root, local)
    (failure,) = (root / "failures" / "mirror" / SHARDS[0]).glob("*.json")
    assert "as the Hub lists it, downloaded" in json.loads(failure.read_text())["error"]


def test_status_and_estimate_count_the_mirror(hub: Hub, tmp_path: Path) -> None:
    from p48ray.report.status import read_status

    hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    finish(root)
    status = {s.stage: (s.done, s.total) for s in read_status(LocalStore(root)).stages}
    assert status["mirror"] == (len(copied()), len(copied()))
    (root / "mirror" / f"{SHARDS[0]}.json").unlink()
    status = {s.stage: (s.done, s.total) for s in read_status(LocalStore(root)).stages}
    assert status["mirror"] == (len(copied()) - 1, len(copied()))


def test_source_that_is_a_data_set_or_a_folder_of_a_repository_is_refused(
    hub: Hub, tmp_path: Path
) -> None:
    hub.commit("datasets/owner/tiny", tiny_files())
    hub.commit(MODEL, tiny_files())
    for place in ("hf://datasets/owner/tiny", "hf://owner/tiny@main/original"):
        outcome = run(tmp_path / "run", place)
        assert (
            outcome.code == 2
            and "source.checkpoint" in outcome.err
            and "the whole repository of a model" in outcome.err
        ), outcome
    outcome = run(tmp_path / "run", "hf://owner/nothing")
    assert outcome.code == 2 and "hf://owner/nothing: no such repository" in outcome.err, outcome
    assert not (tmp_path / "run").exists()


def test_checkpoint_is_verified_against_its_source_on_the_hub(hub: Hub, local: Path) -> None:
    from p48ray.finished.verifier import verify_folder

    hub.commit(MODEL, tiny_files())
    verdict = verify_folder(LocalStore(local / "checkpoint"), HubStore("hf://owner/tiny@main"))
    assert not verdict.problems


def environment(hub: Hub, tmp_path: Path) -> Mapping[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "RAY_DEDUP_LOGS": "0",
    }


@pytest.mark.ray
def test_killed_in_the_middle_of_the_mirror_it_resumes_without_copying_a_finished_file(
    hub: Hub, tmp_path: Path, local: Path, request: pytest.FixtureRequest
) -> None:
    """On Ray, a private repository: the workers get the token from the driver, and it is in no
    file of the run root and in no output."""
    hub.commit(MODEL, tiny_files(), is_private=True)
    root, env = tmp_path / "run", environment(hub, tmp_path)
    hub.pace = 0.05
    process = launch(*arguments(root, settings()), env=dict(env))
    deadline = time.monotonic() + 120
    while (
        not (root / "mirror" / "config.json.json").exists()
        or not hub.sent[SHARDS[0]] + hub.sent[SHARDS[1]] > 2 * EDGE_BYTES
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    killed = process.communicate()
    before = mirror_markers(root)
    assert 0 < len(before) < len(copied())
    hub.pace = 0.0
    sent = hub.sent.copy()
    process = launch(*arguments(root, settings()), env=dict(env))
    out = process.communicate(timeout=240)
    assert process.returncode == 0, out
    after = mirror_markers(root)
    assert {n: after[n] for n in before} == before
    for name in set(before) & set(SHARDS):
        assert hub.sent[name] - sent[name] < EDGE_BYTES
    assert_same_checkpoint(root, local)
    assert not files_with(TOKEN, root) and TOKEN not in "".join((*killed, *out))
    assert not hub.leaked


def test_mirror_in_a_bucket_is_what_the_stitch_copies_from(
    hub: Hub, tmp_path: Path, local: Path, moto_server: Server, aws_identity: None
) -> None:
    hub.commit(MODEL, tiny_files())
    finish(f"s3://{BUCKET}/from-hub", run__endpoint_url=moto_server.endpoint_url)
    store = open_store(f"s3://{BUCKET}/from-hub", moto_server.endpoint_url)
    assert {i.key.removeprefix("source/") for i in store.list("source/")} == copied()
    for name in SHARDS:
        assert store.get(run_root.source_file(name)) == tiny_files()[name]
    for path in (local / "checkpoint").iterdir():
        if path.name != "README.md":  # which names the commit
            assert store.get(f"checkpoint/{path.name}") == path.read_bytes(), path.name


def test_baseline_reads_the_mirror_and_makes_none_of_its_own(hub: Hub, tmp_path: Path) -> None:
    hub.commit(MODEL, tiny_files())
    root = tmp_path / "run"
    held_out = (
        f"{{documents: {TINY}/heldout.jsonl, num_sequences: 2, sequence_length: 64, baseline:"
        " true}"
    )
    finish(root, evaluation=held_out)
    assert (root / "baseline" / "checkpoint" / "p48ray.json").exists()
    assert (
        not (root / "baseline" / "source").exists() and not (root / "baseline" / "mirror").exists()
    )
    shutil.rmtree(root)
