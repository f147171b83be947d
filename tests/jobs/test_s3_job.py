"""The job with its run root, and its source, in buckets of a real server."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.store import Store, open_store, retry
from tests.jobs.command import (
    Outcome,
    arguments,
    invoke,
    launch,
    narrow_model,
    run_process,
    snapshot,
)
from tests.servers.s3 import BUCKET, Server, aws_environment


def settings(server: Server, **more: str) -> dict[str, str]:
    return {"run.endpoint_url": server.endpoint_url, "compression.output_curvature": "true"} | {
        k.replace("__", "."): v for k, v in more.items()
    }


def bucket(server: Server, prefix: str) -> Store:
    return open_store(f"s3://{BUCKET}/{prefix}", server.endpoint_url)


def run(server: Server, prefix: str, env: dict[str, str] | None = None, **more: str) -> Outcome:
    return run_process(
        *arguments(f"s3://{BUCKET}/{prefix}", settings(server, **more)),
        env=aws_environment() | (env or {}),
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a folder, by one process."""
    root = tmp_path_factory.mktemp("local") / "run"
    outcome = invoke(*arguments(root, {"compression.output_curvature": "true"}))
    assert outcome.code == 0, outcome
    return root


def assert_same_checkpoint(store: Store, local: Path) -> None:
    names = set(snapshot(local / "checkpoint"))
    assert {info.key.removeprefix("checkpoint/") for info in store.list("checkpoint/")} == names
    for name in names:
        assert store.get(f"checkpoint/{name}") == (local / "checkpoint" / name).read_bytes(), name


@pytest.mark.ray
def test_run_in_a_bucket_killed_and_resumed_ends_in_the_bytes_of_a_local_one(
    seaweedfs: Server, local: Path
) -> None:
    """Source in a bucket too; the driver, with all its workers, is killed among the units."""
    source = bucket(seaweedfs, "source")
    for path in narrow_model().iterdir():
        if path.suffix != ".jsonl":
            source.put(path.name, path.read_bytes())
    store = bucket(seaweedfs, "killed")
    more = {
        "source__checkpoint": f"s3://{BUCKET}/source",
        "source__endpoint_url": seaweedfs.endpoint_url,
        "run__keep": "checkpoint",
    }
    process = launch(
        *arguments(f"s3://{BUCKET}/killed", settings(seaweedfs, **more)), env=aws_environment()
    )
    deadline = time.monotonic() + 120
    while not (before := manifests(store)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    outcome = run(seaweedfs, "killed", **more)
    assert outcome.code == 0, outcome
    after = manifests(store)
    assert (len(after), {unit: after[unit] for unit in before}) == (16, before)
    assert_same_checkpoint(store, local)
    facts = json.loads(store.get("store.json"))
    assert (facts["range_copy"], facts["unequal_parts"], facts["checksums"]) == (True, True, True)
    assert (
        [i.key for i in store.list("probe/")]
        == [i.key for i in store.list("units/") if i.key.endswith(".safetensors")]
        == []
    )


def manifests(store: Store) -> dict[str, bytes]:
    return {
        i.key.split("/")[1]: store.get(i.key)
        for i in store.list("units/")
        if i.key.endswith("/manifest.json")
    }


def test_server_that_copies_no_ranges_is_streamed_through_workers_to_the_same_bytes(
    moto_server: Server, local: Path
) -> None:
    """moto as the second implementation; what the probe said is then overruled, as if it had found
    no range copy."""
    store = bucket(moto_server, "streamed")
    store.put("store.json", b'{"range_copy": false, "unequal_parts": false, "checksums": false}')
    outcome = invoke(*arguments(f"s3://{BUCKET}/streamed", settings(moto_server)))
    assert outcome.code == 0, outcome
    assert_same_checkpoint(store, local)


def test_wrong_secret_is_a_users_mistake_that_names_the_bucket(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    outcome = invoke(*arguments(f"s3://{BUCKET}/denied", settings(seaweedfs)))
    assert outcome.code == 2, outcome
    assert BUCKET in outcome.err
    monkeypatch.undo()
    assert list(bucket(seaweedfs, "denied").list()) == []


def test_server_that_is_not_there_fails_within_the_bounded_retries(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = 9  # discard: nobody listens
    monkeypatch.setattr(retry, "S3", replace(retry.S3, base_s=0.001))
    outcome = invoke(
        *arguments(f"s3://{BUCKET}/gone", {"run.endpoint_url": f"http://127.0.0.1:{port}"})
    )
    assert outcome.code == 1, outcome
    assert f"127.0.0.1:{port}" in outcome.err and f"failed {retry.S3.attempts} times" in outcome.err
