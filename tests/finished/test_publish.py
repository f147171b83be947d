"""jobs/publish.py without Ray, over HTTP, to a server that checks what it is sent."""

import dataclasses
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from p48ray.finished import upload
from p48ray.finished.branch import Hub as Client
from p48ray.finished.branch import Target, uploaded_shard
from p48ray.report.plan_table import size
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import PublishedShard
from p48ray.store import LocalStore
from tests.finished.publish_command import (
    REPO_NAME,
    checkpoint_files,
    files_with,
    invoke_publish,
    launch_publish,
    published,
)
from tests.servers.hub import TOKEN, Fault, Handler, Hub, LostConnectionError

FIRST = "model-00001-of-00006.safetensors"


def shards(root: Path) -> list[Path]:
    return sorted((root / "checkpoint").glob("*.safetensors"))


def sent(hub: Hub) -> dict[str, int]:
    """SHA-256 -> bytes of content that the Hub received."""
    return dict(hub.received)


def each_once(root: Path) -> dict[str, int]:
    return {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in shards(root)
    }


def test_hub_has_the_checkpoint_byte_for_byte_in_one_commit(root: Path, hub: Hub) -> None:
    outcome = invoke_publish(root, hub)
    assert outcome.code == 0, outcome
    assert published(hub) == checkpoint_files(root)
    assert len(hub.commits(REPO_NAME)) == 2  # with that of the creation
    assert sent(hub) == each_once(root)
    assert any("/complete" in r for r in hub.requests) and any(
        r.count("/") == 3 for r in hub.requests if r.startswith("PUT")
    )
    total = size(sum(path.stat().st_size for path in shards(root)))
    assert f"6/6 shards  {total} of {total}  100 %" in outcome.out
    records = [json.loads(p.read_bytes()) for p in sorted((root / "publish").rglob("*.json"))]
    assert {r["path"]: (r["sha256"], r["size_bytes"]) for r in records} == {
        p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size) for p in shards(root)
    }
    assert {(r["repo"], r["revision"], r["endpoint"]) for r in records} == {
        (REPO_NAME, "main", hub.url)
    }


def test_again_sends_nothing_and_makes_no_commit(root: Path, hub: Hub) -> None:
    invoke_publish(root, hub)
    hub.requests.clear()
    outcome = invoke_publish(root, hub)
    assert outcome.code == 0
    assert len(hub.commits(REPO_NAME)) == 2
    assert sent(hub) == each_once(root)
    assert not [r for r in hub.requests if "commit" in r or "lfs" in r]


def test_lost_records_cost_no_upload(root: Path, hub: Hub) -> None:
    invoke_publish(root, hub)
    for record in (root / "publish").rglob("*.json"):
        record.unlink()
    assert invoke_publish(root, hub).code == 0
    assert sent(hub) == each_once(root)
    assert len(hub.commits(REPO_NAME)) == 2


def test_the_driver_commits_shards_without_reading_them(root: Path, hub: Hub) -> None:
    hub.on["commit"] = interrupt
    assert invoke_publish(root, hub).code == 1
    for path in shards(root):
        path.chmod(0o600)
        path.write_bytes(bytes(path.stat().st_size))  # nobody looks at them again
    hub.on.clear()
    assert invoke_publish(root, hub).code == 0
    assert {
        hashlib.sha256(data).hexdigest()
        for name, data in published(hub).items()
        if name.endswith(".safetensors")
    } == set(sent(hub))


def interrupt(handler: Handler) -> None:
    raise LostConnectionError


def test_an_object_that_the_hub_has_lost_is_sent_again(root: Path, hub: Hub) -> None:
    hub.on["commit"] = interrupt
    assert invoke_publish(root, hub).code == 1
    lost = hashlib.sha256((root / "checkpoint" / FIRST).read_bytes()).hexdigest()
    hub.object(lost).unlink()
    hub.on.clear()
    assert invoke_publish(root, hub).code == 0
    expected = each_once(root)
    assert sent(hub) == expected | {lost: 2 * expected[lost]}
    assert published(hub) == checkpoint_files(root)


def test_a_lost_reply_is_not_a_second_commit(root: Path, hub: Hub) -> None:
    hub.on["committed"] = interrupt
    outcome = invoke_publish(root, hub)
    assert outcome.code == 0, outcome
    assert len(hub.commits(REPO_NAME)) == 2
    assert hub.requests[f"POST /api/models/{REPO_NAME}/commit/main"] == 1


def test_a_commit_that_came_first_is_built_upon(root: Path, hub: Hub) -> None:
    def overtake(handler: Handler) -> None:
        hub.on.clear()
        hub.commit(REPO_NAME, hub.files(REPO_NAME) | {"NOTES.md": b"mine"}, message="a hand's")

    hub.on["commit"] = overtake
    assert invoke_publish(root, hub).code == 0
    assert hub.commits(REPO_NAME)[1] == "a hand's" and len(hub.commits(REPO_NAME)) == 3
    assert published(hub) == checkpoint_files(root) | {"NOTES.md": b"mine"}


def test_two_drivers_at_once_make_one_commit(root: Path, hub: Hub) -> None:
    def overtake(handler: Handler) -> None:
        hub.on.clear()
        assert invoke_publish(root, hub).code == 0

    hub.on["commit"] = overtake
    assert invoke_publish(root, hub).code == 0
    assert len(hub.commits(REPO_NAME)) == 2
    assert published(hub) == checkpoint_files(root)


def test_a_commit_that_is_never_taken_ends_with_1(root: Path, hub: Hub) -> None:
    hub.on["commit"] = interrupt
    outcome = invoke_publish(root, hub)
    assert outcome.code == 1 and "run the same command again" in outcome.err
    assert set(published(hub)) == set()


@pytest.mark.parametrize(
    "name",
    [".env", "modeling_more.py", "weights.bin", "more/notes.md", ".eval_results/p48ray.yaml"],
)
def test_what_the_job_did_not_make_is_refused_by_name(root: Path, hub: Hub, name: str) -> None:
    stranger = root / "checkpoint" / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"whatever")
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2, outcome
    assert f"{name}: not in p48ray.json" in outcome.err and "nothing was sent" in outcome.err
    assert not hub.received
    stranger.unlink()
    assert invoke_publish(root, hub).code == 0


def test_a_card_that_was_edited_is_a_commit_of_the_card_alone(root: Path, hub: Hub) -> None:
    invoke_publish(root, hub)
    card = root / "checkpoint" / "README.md"
    card.write_bytes(card.read_bytes() + b"\nEdited.\n")
    assert invoke_publish(root, hub).code == 0
    assert published(hub) == checkpoint_files(root)
    assert len(hub.commits(REPO_NAME)) == 3 and sent(hub) == each_once(root)


def test_a_card_that_the_hub_does_not_take_is_refused_before_the_upload(
    root: Path, hub: Hub
) -> None:
    card = root / "checkpoint" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\npipeline_tag: no-such-task\n", 1))
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and "README.md" in outcome.err and "no such task" in outcome.err
    assert sent(hub) == {}


def test_records_of_an_earlier_checkpoint_do_not_count(root: Path, hub: Hub) -> None:
    """Same names, same sizes, other bytes, verified anew: the Hub gets the new ones."""
    invoke_publish(root, hub)
    before = each_once(root)
    last = shards(root)[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    name, end = max(
        (
            (n, e["data_offsets"])
            for n, e in json.loads(data[8:header_bytes]).items()
            if n != "__metadata__"
        ),
        key=lambda pair: pair[1][1],
    )
    store = LocalStore(root / "checkpoint")
    manifest = CheckpointManifest.load(store, "p48ray.json")
    digest = hashlib.sha256(data[header_bytes + end[0] :]).hexdigest()
    untouched = manifest.untouched_sha256 | {name: digest}
    store.put(
        "p48ray.json",
        manifest.model_copy(update={"untouched_sha256": untouched}).sealed().to_json(),
    )
    assert invoke_publish(root, hub).code == 0
    assert published(hub) == checkpoint_files(root)
    assert sent(hub) == before | each_once(root)


def test_branch_and_private_repository_are_made(root: Path, hub: Hub) -> None:
    assert invoke_publish(root, hub, "--private", "--revision", "release/1").code == 0
    assert hub.repos[REPO_NAME].is_private
    assert published(hub, "release/1") == checkpoint_files(root)
    assert published(hub) == {}


def test_a_public_repository_is_not_used_as_a_private_one(root: Path, hub: Hub) -> None:
    invoke_publish(root, hub, "--revision", "other")
    hub.received.clear()
    outcome = invoke_publish(root, hub, "--private")
    assert outcome.code == 2 and "is public" in outcome.err
    assert published(hub) == {} and sent(hub) == {}


def test_dry_run_sends_nothing(root: Path, hub: Hub) -> None:
    files = {name: len(data) for name, data in checkpoint_files(root).items()}
    small = sum(num for name, num in files.items() if not name.endswith(".safetensors"))
    first = invoke_publish(root, hub, "--dry-run")
    assert first.code == 0 and f"to send at most {size(sum(files.values()))};" in first.out
    assert all(f" {name} " in first.out and f"{num:,}" in first.out for name, num in files.items())
    assert hub.repos == {}
    hub.on["commit"] = interrupt
    invoke_publish(root, hub)
    hub.on.clear()
    hub.requests.clear()
    between = invoke_publish(root, hub, "--dry-run")
    assert between.out.count("uploaded") == 6 and f"to send at most {size(small)};" in between.out
    assert {r.split("/")[1] for r in hub.requests} == {"api"}
    assert not [r for r in hub.requests if "commit" in r or "create" in r or "preupload" in r]
    invoke_publish(root, hub)
    last = invoke_publish(root, hub, "--dry-run")
    assert last.out.count("on the Hub") == len(files) and "to send at most 0 B" in last.out


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["publish", "dry"])
def test_a_wrong_token_is_the_users_mistake_and_is_shown_nowhere(
    root: Path, hub: Hub, args: tuple[str, ...]
) -> None:
    outcome = invoke_publish(root, hub, *args, token="hf_WrongWrongWrong")
    assert outcome.code == 2 and "owner/tiny: whoami: the Hub refuses access (401" in outcome.err
    assert "hf_WrongWrongWrong" not in outcome.out + outcome.err
    assert files_with("hf_WrongWrongWrong", root) == []
    assert hub.repos == {}


def test_without_a_token_nobody_is_asked(root: Path, hub: Hub) -> None:
    outcome = invoke_publish(root, hub, token="")
    assert outcome.code == 2 and "HF_TOKEN" in outcome.err and not hub.requests


def test_a_token_that_may_only_read_is_refused_before_anything_is_sent(
    root: Path, hub: Hub
) -> None:
    hub.role = "read"
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and "may only read" in outcome.err and hub.repos == {}


@pytest.mark.parametrize(
    "repo",
    [
        "tiny",
        "a/b/c",
        "owner/",
        "/tiny",
        "owner/a..b",
        "https://huggingface.co/owner/tiny",
        "owner/ti ny",
    ],
)
def test_what_is_not_owner_and_name_is_refused(root: Path, hub: Hub, repo: str) -> None:
    outcome = invoke_publish(root, hub, repo=repo)
    assert outcome.code == 2 and "owner/name" in outcome.err and not hub.requests


OLD = {
    "model-00001-of-00004.safetensors": b"of an earlier upload",
    "model.safetensors": b"in one file",
    "consolidated.safetensors": b"another client's",
    "original/Weights.PTH": b"in a folder",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b"{}",
}
BESIDE = {"NOTES.md": b"mine", "tokenizer_config.json.bak": b"{}"}


def published_before(hub: Hub) -> None:
    """The repository has other weights, what belongs to them, and what does not."""
    hub.commit(REPO_NAME, OLD | BESIDE | {"config.json": b"{}"})


def test_weights_of_before_are_refused_by_name_before_anything_is_sent(
    root: Path, hub: Hub
) -> None:
    published_before(hub)
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and "6 files of weights" in outcome.err, outcome
    assert all(f"  {name}\n" in outcome.err for name in OLD) and "--replace" in outcome.err
    assert not any(name in outcome.err for name in BESIDE)
    assert sent(hub) == {} and len(hub.commits(REPO_NAME)) == 1


def test_weights_of_before_go_in_the_same_commit(root: Path, hub: Hub) -> None:
    published_before(hub)
    outcome = invoke_publish(root, hub, "--replace")
    assert outcome.code == 0, outcome
    assert published(hub) == checkpoint_files(root) | BESIDE
    assert len(hub.commits(REPO_NAME)) == 2
    assert invoke_publish(root, hub).code == 0 and len(hub.commits(REPO_NAME)) == 2


def test_weights_that_came_beside_a_published_checkpoint_are_a_commit_of_their_own(
    root: Path, hub: Hub
) -> None:
    assert invoke_publish(root, hub).code == 0
    hub.commit(REPO_NAME, hub.files(REPO_NAME) | {"model.safetensors": b"by hand"})
    assert invoke_publish(root, hub).code == 2
    assert invoke_publish(root, hub, "--replace").code == 0
    assert published(hub) == checkpoint_files(root) and sent(hub) == each_once(root)


@pytest.mark.parametrize("args", [(), ("--replace",)], ids=["kept", "replaced"])
def test_weights_that_come_during_the_upload_are_not_left_beside_it(
    root: Path, hub: Hub, args: tuple[str, ...]
) -> None:
    def overtake(handler: Handler) -> None:
        hub.on.clear()
        hub.commit(REPO_NAME, hub.files(REPO_NAME) | {"model.safetensors": b"by hand"})

    hub.on["commit"] = overtake
    outcome = invoke_publish(root, hub, *args)
    if args:
        assert outcome.code == 0 and published(hub) == checkpoint_files(root)
    else:
        assert outcome.code == 2 and "  model.safetensors\n" in outcome.err
        assert published(hub) == {"model.safetensors": b"by hand"}


def test_a_lost_reply_to_a_commit_that_deletes_is_not_a_second_one(root: Path, hub: Hub) -> None:
    published_before(hub)
    hub.on["committed"] = interrupt
    assert invoke_publish(root, hub, "--replace").code == 0
    assert len(hub.commits(REPO_NAME)) == 2
    assert published(hub) == checkpoint_files(root) | BESIDE


@pytest.mark.parametrize("branch", ["main", "new"])
def test_dry_run_shows_weights_of_before(root: Path, hub: Hub, branch: str) -> None:
    """A new branch begins as a copy of main."""
    published_before(hub)
    before = dict(hub.files(REPO_NAME))
    stopped, replaced = (
        invoke_publish(root, hub, "--dry-run", "--revision", branch, *args)
        for args in ((), ("--replace",))
    )
    assert stopped.code == replaced.code == 0
    assert stopped.out.count("in the way") == 6 and "without --replace publishing" in stopped.out
    assert replaced.out.count("to delete") == 6 and "without --replace" not in replaced.out
    assert all(name in replaced.out for name in OLD)
    total = size(sum(len(data) for data in checkpoint_files(root).values()))
    for outcome in (stopped, replaced):
        assert f"{len(checkpoint_files(root))} files, {total}, to send" in outcome.out
    assert hub.files(REPO_NAME) == before and list(hub.repos[REPO_NAME].branches) == ["main"]


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def resize(root: Path) -> None:
    with (root / "checkpoint" / FIRST).open("ab") as file:
        file.write(b"\0")


def edit(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        data = (root / name).read_bytes()
        assert old in data
        (root / name).write_bytes(data.replace(old, new, 1))

    return act


VERDICT = f"verification/{FIRST.removesuffix('.safetensors')}.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (remove("checkpoint/model.safetensors.index.json"), "model.safetensors.index.json"),
    "no manifest": (remove("checkpoint/p48ray.json"), "p48ray.json"),
    "no shard": (remove(f"checkpoint/{FIRST}"), FIRST),
    "no verdict": (remove(VERDICT), f"{FIRST}: no verdict at {VERDICT}"),
    "no tokenizer": (remove("checkpoint/tokenizer.json"), "tokenizer.json: missing"),
    "problems": (
        edit(VERDICT, b'"problems": []', b'"problems": ["an illegal pattern"]'),
        "an illegal pattern",
    ),
    "verdict of another plan": (
        edit(VERDICT, b'"plan_digest": "', b'"plan_digest": "0'),
        "its verdict is of plan",
    ),
    "another size": (resize, "bytes when it was verified"),
    "another config": (edit("checkpoint/config.json", b"{", b"{ "), "config.json"),
    "manifest changed": (
        edit("checkpoint/p48ray.json", b'"unit_sha256": {', b'"unit_sha256": {"x": "y", '),
        "p48ray.json",
    ),
    "stray shard": (
        lambda root: (root / "checkpoint" / "model-x.safetensors").touch(),
        "model-x.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_complete_and_verified_is_refused_by_name(
    root: Path, hub: Hub, damage: str
) -> None:
    act, said = DAMAGES[damage]
    act(root)
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and said in outcome.err, outcome
    assert not hub.requests  # nobody was asked


def test_a_folder_that_is_no_run_root_is_refused(tmp_path: Path, hub: Hub) -> None:
    outcome = invoke_publish(tmp_path / "nothing", hub)
    assert outcome.code == 2 and "no model.safetensors.index.json" in outcome.err


@pytest.mark.parametrize("where", ["length", "header", "unit", "untouched"])
def test_a_shard_changed_after_verification_is_refused(root: Path, hub: Hub, where: str) -> None:
    """One bit, the size as it was."""
    index = json.loads((root / "checkpoint" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    wanted = next(
        name
        for name in sorted(index)
        if name.endswith(".weight_packed" if where == "unit" else "embed_tokens.weight")
    )
    path = root / "checkpoint" / index[wanted]
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:header_bytes])[wanted]["data_offsets"]
    at = {
        "length": 2,
        "header": header_bytes // 2,
        "unit": header_bytes + first,
        "untouched": header_bytes + end - 1,
    }[where]
    data[at] ^= 1
    path.write_bytes(data)
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and f"{path.name}: changed since it was verified" in outcome.err, (
        outcome
    )
    if where in ("unit", "untouched"):
        assert (
            "unit L001" in outcome.err
            if where == "unit"
            else ".weight: expected SHA-256" in outcome.err
        )
    assert published(hub) == {} and hashlib.sha256(data).hexdigest() not in sent(hub)


def test_every_byte_of_every_shard_is_held_against_the_manifest(root: Path, tmp_path: Path) -> None:
    """Ranges much smaller than tensors, and not a divisor of anything, give the same answer, and
    none is larger than said."""
    checkpoint = LocalStore(root / "checkpoint")
    manifest = CheckpointManifest.load(checkpoint, "p48ray.json")
    asked: list[int] = []
    whole = checkpoint.get_range
    for path in shards(root):
        checkpoint.get_range = lambda key, start, num: asked.append(num) or whole(key, start, num)  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch, (tmp_path / "staged").open("wb") as file:
            patch.setattr(upload, "RANGE_BYTES", 99_991)
            sha256 = upload.stage_shard(checkpoint, path.name, path.stat().st_size, manifest, file)
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (tmp_path / "staged").read_bytes() == path.read_bytes()
    assert max(asked) <= 99_991


def test_an_operation_made_from_a_record_is_as_huggingface_hub_leaves_its_own(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO_NAME)
    theirs = CommitOperationAdd(FIRST, root / "checkpoint" / FIRST)
    api.preupload_lfs_files(REPO_NAME, [theirs])
    size_bytes, sha256 = theirs.upload_info.size, theirs.upload_info.sha256
    record = PublishedShard(
        endpoint="",
        repo="",
        revision="",
        path=FIRST,
        size_bytes=size_bytes,
        sha256=sha256.hex(),
        checkpoint_sha256="",
        finished_at=0.0,
    )
    ours = uploaded_shard(record)
    assert (ours.upload_info.size, ours.upload_info.sha256) == (size_bytes, sha256)
    names = [f.name for f in dataclasses.fields(CommitOperationAdd)]
    differing = {name for name in names if getattr(theirs, name) != getattr(ours, name)}
    # the latter False for None; both let it pass
    assert differing == {"upload_info", "_should_ignore"}
    assert ours.path_or_fileobj == b"" and ours._is_uploaded


def test_a_hub_that_is_out_of_breath_is_asked_again(root: Path, hub: Hub) -> None:
    hub.faults += [Fault("GET /api/whoami-v2", 503)] * 2
    assert invoke_publish(root, hub).code == 0
    assert not hub.faults and hub.requests["GET /api/whoami-v2"] == 3


def test_no_text_of_a_client_has_its_token() -> None:
    client = Client(Target("http://hub", REPO_NAME, "main"), TOKEN)
    uploader = upload.Uploader(LocalStore("/nowhere"), None, client, "p48ray.json", "")
    assert TOKEN not in f"{client} {client!r} {uploader} {uploader!r} {[client]}"


def test_a_crash_shows_no_token(root: Path, hub: Hub, tmp_path: Path) -> None:
    """The library's functions have it in their locals. A description of nothing makes one."""
    hub.faults.append(Fault(f"GET /api/models/{REPO_NAME}/revision/main", 200))
    process = launch_publish(root, hub, "--dry-run", env={"HF_HOME": str(tmp_path)})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "KeyError" in err
    assert TOKEN not in out + err


@pytest.mark.parametrize("path", ["{oid}/3", "{oid}/4"], ids=["other bytes", "another size"])
def test_the_server_refuses_an_object_that_is_not_what_its_name_says(hub: Hub, path: str) -> None:
    oid = hashlib.sha256(b"abc").hexdigest()
    data = b"abd" if path.endswith("3") else b"abc"
    request = urllib.request.Request(
        f"{hub.storage_url}/lfs/{path.format(oid=oid)}", data=data, method="PUT"
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert not hub.object(oid).exists()
