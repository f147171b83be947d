"""Every command about a run root, with the run root and the source in a bucket of a server that is
not AWS's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.store import Store, open_store
from tests.conftest import REPO
from tests.finished.publish_command import launch_publish, published
from tests.jobs.command import ROUNDED, arguments, invoke, narrow_model, own_logging
from tests.servers.hub import TOKEN, Hub
from tests.servers.s3 import BUCKET, Server

LINEAR = "language_model.model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def root(seaweedfs: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run with its source beside it, as it would lie in a bucket."""
    folder = tmp_path_factory.mktemp("to-bucket") / "run"
    outcome = invoke(*arguments(folder, ROUNDED))
    assert outcome.code == 0, outcome
    store, source = (bucket(seaweedfs, prefix) for prefix in ("commands/run", "commands/source"))
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    for path in narrow_model().iterdir():
        if path.suffix != ".jsonl":
            source.put(path.name, path.read_bytes())
    return f"s3://{BUCKET}/commands/run"


@pytest.fixture(autouse=True)
def no_endpoint_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield


def bucket(server: Server, prefix: str) -> Store:
    return open_store(f"s3://{BUCKET}/{prefix}", server.endpoint_url)


def call(*words: str) -> Result:
    with own_logging():
        result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_page_of_a_run_that_goes_on_in_a_bucket_is_a_file_here(
    root: str, seaweedfs: Server, tmp_path: Path
) -> None:
    finished, half = bucket(seaweedfs, "commands/run"), bucket(seaweedfs, "commands/half")
    for info in finished.list():
        if not info.key.startswith(("checkpoint/", "verification/", "report/", "residuals/")):
            half.put(info.key, finished.get(info.key))
    held, place = [info.key for info in half.list()], f"s3://{BUCKET}/commands/half"
    endpoint = ("--endpoint-url", seaweedfs.endpoint_url)
    found = call("report", place, "--output", str(tmp_path / "half.html"), *endpoint)
    assert found.exit_code == 0 and "not complete" in found.stdout, found.output
    assert "reduce not begun" in " ".join((tmp_path / "half.html").read_text().split())
    found = call("report", root, "--output", str(tmp_path / "whole.html"), *endpoint)
    assert (tmp_path / "whole.html").read_bytes() == finished.get("report/report.html")
    assert [info.key for info in half.list()] == held


def test_status_verify_and_inspect_reach_it_by_the_option(root: str, seaweedfs: Server) -> None:
    endpoint = ("--endpoint-url", seaweedfs.endpoint_url)
    source = ("--source", f"s3://{BUCKET}/commands/source")
    found = call("status", root, *endpoint)
    assert found.exit_code == 0 and "  complete" in found.stdout
    found = call("status", "--watch", root, *endpoint)
    assert found.exit_code == 0 and "  complete" in found.stdout
    for more in ((), source):
        found = call("verify", f"{root}/checkpoint", *endpoint, *more)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["problems"] == []
        assert json.loads(found.stdout)["compared_with_source"] == bool(more)
    found = call("inspect", f"{root}/checkpoint", *endpoint, "--linear", LINEAR, *source)
    assert found.exit_code == 0 and "relative weight error" in found.stdout


def test_source_may_lie_elsewhere_than_its_checkpoint(
    root: str, seaweedfs: Server, moto_server: Server
) -> None:
    elsewhere = bucket(moto_server, "source-elsewhere")
    for path in narrow_model().iterdir():
        if path.suffix != ".jsonl":
            elsewhere.put(path.name, path.read_bytes())
    places = (
        "--endpoint-url",
        seaweedfs.endpoint_url,
        "--source",
        f"s3://{BUCKET}/source-elsewhere",
    )
    found = call(
        "verify", f"{root}/checkpoint", *places, "--source-endpoint-url", moto_server.endpoint_url
    )
    assert found.exit_code == 0, found.output
    refused = call("verify", f"{root}/checkpoint", *places)
    assert refused.exit_code == 2 and "config.json" in refused.stderr


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_status_reaches_it_by_boto3s_own_variables(
    root: str, seaweedfs: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, seaweedfs.endpoint_url)
    assert call("status", root).exit_code == 0


def verify_process(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "p48ray.cli", "verify", *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.ray
def test_verify_prints_the_same_json_with_one_process_and_with_two(
    root: str, seaweedfs: Server
) -> None:
    """A fault in the bucket, so that there is something to say; progress in bytes is on the
    standard error alone."""
    store = bucket(seaweedfs, "commands/damaged")
    for info in bucket(seaweedfs, "commands/run/checkpoint").list():
        store.put(info.key, bucket(seaweedfs, "commands/run/checkpoint").get(info.key))
    shard = sorted(i.key for i in store.list() if i.key.endswith(".safetensors"))[3]
    data = bytearray(store.get(shard))
    data[-1] ^= 1
    store.put(shard, bytes(data))
    place = (
        f"s3://{BUCKET}/commands/damaged",
        "--source",
        f"s3://{BUCKET}/commands/source",
        "--endpoint-url",
        seaweedfs.endpoint_url,
    )
    one, two = (verify_process(*place, *more) for more in ((), ("--workers", "2")))
    assert (one.returncode, two.returncode) == (1, 1), (one, two)
    assert one.stdout == two.stdout
    assert len(json.loads(two.stdout)["problems"]) == 1
    for found in (one, two):
        assert "verify    6/6 shards" in found.stderr and "100 %" in found.stderr
    assert "Traceback" not in two.stderr


@pytest.mark.ray
def test_publish_takes_it_to_the_hub_and_leaves_its_records_in_the_bucket(
    root: str, seaweedfs: Server, tmp_path: Path
) -> None:
    hub = Hub(tmp_path / "hub", part_bytes=300_000)
    store = bucket(seaweedfs, "commands/run")
    endpoint = ("--endpoint-url", seaweedfs.endpoint_url)
    env = {
        name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "NO_PROXY"))
    } | {"HF_HOME": str(tmp_path / "hf")}
    try:
        for state in ("to send", None, "on the Hub"):
            more = ("--dry-run",) if state else ("--workers", "2")
            process = launch_publish(root, hub, *endpoint, *more, env=env)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, (out, err)
            assert state is None or f" {state} " in out
            assert TOKEN not in out + err
        names = [info.key for info in store.list("checkpoint/")]
        assert published(hub) == {
            name.removeprefix("checkpoint/"): store.get(name) for name in names
        }
    finally:
        hub.close()
    assert len(list(store.list("publish/"))) == 6


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "guessed"}, 2, (BUCKET, "credentials")),
        ({"run": "s3://no-such-bucket-here/run"}, 2, ("no-such-bucket-here",)),
        (
            {"run": f"s3://{BUCKET}/commands/nothing"},
            2,
            ("expected a finished checkpoint", f"s3://{BUCKET}/commands/nothing"),
        ),
    ],
    ids=["wrong secret", "no bucket", "nothing there"],
)
def test_publish_says_what_is_wrong_with_a_bucket(
    root: str,
    seaweedfs: Server,
    tmp_path: Path,
    settings: dict[str, str],
    code: int,
    words: tuple[str, ...],
) -> None:
    hub = Hub(tmp_path / "hub")
    env = {name: value for name, value in settings.items() if name != "run"} | {
        "HF_HOME": str(tmp_path / "hf")
    }
    try:
        process = launch_publish(
            settings.get("run", root), hub, "--endpoint-url", seaweedfs.endpoint_url, env=env
        )
        out, err = process.communicate(timeout=120)
    finally:
        hub.close()
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err and all(word in err for word in words), err
