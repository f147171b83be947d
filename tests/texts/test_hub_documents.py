"""Texts in data sets on the Hub and in buckets: the same tokens as from a folder, at one commit,
without reading more than is needed."""

import io
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, ConfigError
from p48ray.run.plan import RunPlan
from p48ray.store import LocalStore, open_store, retry
from p48ray.texts import documents
from p48ray.texts.documents import digest_documents, read_documents
from tests.conftest import TINY
from tests.jobs.command import ROUNDED, arguments, invoke, snapshot
from tests.servers.hub import TOKEN, Fault, Hub
from tests.servers.s3 import BUCKET, Server

KEY = "calibration.documents"
DATA = "datasets/owner/texts"
LINES = (TINY / "calibration.jsonl").read_bytes().splitlines()[:400]
PLACE = "hf://datasets/owner/texts"


def source(path: str, endpoint_url: str | None = None) -> DocumentSource:
    return DocumentSource(path=path, endpoint_url=endpoint_url)


def table(rows: list[dict[str, object]], group: int = 50) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def texts(count: int = 400) -> list[dict[str, object]]:
    return [{"text": json.loads(line)["text"]} for line in LINES[:count]]


def data_set() -> dict[str, bytes]:
    return {
        "README.md": b"---\n---\n",
        "data/a.jsonl": b"\n".join(LINES[:100]),
        "data/b.parquet": table(texts()[100:]),
        "other/c.csv": b"x",
    }


@pytest.mark.parametrize("path", ["", "/data", "@main/data"])
def test_folder_of_a_data_set_reads_like_the_files_on_disk(
    hub: Hub, tmp_path: Path, path: str
) -> None:
    hub.commit(DATA, data_set())
    for name, data in data_set().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = list(read_documents(source(PLACE + path), KEY))
    assert found == list(read_documents(source(str(tmp_path / "data")), KEY)) and len(found) == len(
        LINES
    )
    assert not hub.leaked


def test_one_file_of_a_data_set_is_the_same_source_as_that_file(hub: Hub, tmp_path: Path) -> None:
    hub.commit(DATA, data_set())
    (tmp_path / "a.jsonl").write_bytes(data_set()["data/a.jsonl"])
    remote, local = source(f"{PLACE}@main/data/a.jsonl"), source(str(tmp_path / "a.jsonl"))
    assert list(read_documents(remote, KEY)) == list(read_documents(local, KEY))
    assert digest_documents([remote], KEY) == digest_documents([local], KEY)


def test_digest_of_a_large_data_set_needs_its_listing_only(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 1000)
    hub.commit(DATA, data_set())
    before = digest_documents([source(f"{PLACE}/data")], KEY)
    assert not hub.sent
    hub.commit(DATA, data_set() | {"README.md": b"other words"})
    assert digest_documents([source(f"{PLACE}/data")], KEY) == before, "the texts are the same"
    hub.commit(DATA, data_set() | {"data/b.parquet": table(texts()[101:])})
    assert digest_documents([source(f"{PLACE}/data")], KEY) != before


def test_sample_of_a_large_data_set_reads_a_part_of_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(documents, "VISIT_CHARACTERS", 5000)
    generator = [
        {"text": f"{i} " + "".join(chr(97 + (i * i + 7 * j * j + j) % 26) for j in range(2000))}
        for i in range(600)
    ]
    files = {
        f"data/{n}.parquet": table(generator[100 * n : 100 * n + 100], group=20) for n in range(6)
    }
    hub.commit(DATA, files)
    found = read_documents(source(PLACE), KEY, 1)
    first = [next(found) for _ in range(4)]
    assert len({int(text.split()[0]) // 100 for text in first}) > 1
    assert {path for path, n in hub.sent.items() if n} <= set(files) and len(hub.sent) == 2
    assert not [asked for path, asked in hub.ranges if asked is None], "a file was asked for whole"


def test_corrupted_data_set_is_not_taken_for_texts(hub: Hub) -> None:
    data = bytearray(data_set()["data/b.parquet"])
    data[10:-200] = bytes(len(data) - 210)
    hub.commit(DATA, {"b.parquet": bytes(data)})
    with pytest.raises(
        CalibrationError, match=r"calibration\.documents: hf://datasets/owner/texts/b\.parquet"
    ):
        list(read_documents(source(PLACE), KEY))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hf://datasets/owner/nothing", "no such repository"),
        (f"{PLACE}@v9", "no such branch, tag or commit"),
        (
            f"{PLACE}/nowhere",
            ".parquet, .pq files in it, found nothing",
        ),
        (f"{PLACE}/other", "found other/c.csv"),
    ],
)
def test_place_that_is_not_there_is_a_users_mistake_by_key(hub: Hub, path: str, words: str) -> None:
    hub.commit(DATA, data_set())
    with pytest.raises(ConfigError, match=rf"calibration\.documents: .*{words}"):
        digest_documents([source(path)], KEY)


def test_private_data_set_is_read_with_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(DATA, data_set(), is_private=True)
    with pytest.raises(
        ConfigError, match="no such repository, or one that this token may not read"
    ):
        list(read_documents(source(PLACE), KEY))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(list(read_documents(source(PLACE), KEY))) == len(LINES)


def test_file_and_prefix_in_a_bucket_read_like_the_files_on_disk(
    moto_server: Server, aws_identity: None
) -> None:
    store = open_store(f"s3://{BUCKET}/texts", moto_server.endpoint_url)
    for name, data in data_set().items():
        store.put(name, data)
    whole = list(read_documents(source(f"s3://{BUCKET}/texts/data", moto_server.endpoint_url), KEY))
    assert whole == [t["text"] for t in texts()]
    assert (
        list(
            read_documents(
                source(f"s3://{BUCKET}/texts/data/a.jsonl", moto_server.endpoint_url), KEY
            )
        )
        == whole[:100]
    )


def test_digest_of_large_texts_in_a_bucket_is_what_the_bucket_keeps(
    moto_server: Server, aws_identity: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 1000)
    store = open_store(f"s3://{BUCKET}/large", moto_server.endpoint_url)
    store.put("a.jsonl", b"\n".join(LINES))
    place = source(f"s3://{BUCKET}/large", moto_server.endpoint_url)
    monkeypatch.setattr(documents, "_stream", lambda file, key: pytest.fail("the bytes were read"))
    before = digest_documents([place], KEY)
    store.put("a.jsonl", b"\n".join(LINES[:-1]) + b" ")
    assert digest_documents([place], KEY) != before


# Through the job.


def mix(hub_path: str) -> dict[str, str]:
    held_out = f"{{documents: '{hub_path}/data/a.jsonl', num_sequences: 2, sequence_length: 64}}"
    return ROUNDED | {
        "calibration.documents": (
            f"[{{path: '{hub_path}/data', weight: 3}}, {{path: {TINY}/heldout.jsonl}}]"
        ),
        "evaluation": held_out,
    }


def test_run_keeps_to_the_commit_of_its_texts_though_the_branch_has_moved(
    hub: Hub, tmp_path: Path
) -> None:
    commit = hub.commit(DATA, data_set())
    root = tmp_path / "run"
    outcome = invoke(*arguments(root, mix(PLACE)))
    assert outcome.code == 0, outcome
    plan = RunPlan.load(LocalStore(root), "plan.json")
    assert plan.revisions == {f"{PLACE}/data": commit, f"{PLACE}/data/a.jsonl": commit}
    assert plan.config.calibration.documents[0].path == f"{PLACE}@{commit}/data"
    before = snapshot(root)
    hub.commit(DATA, {"data/a.jsonl": b'{"text": "other"}\n'})
    (root / "calibration" / "tokens.arrow").unlink()
    outcome = invoke(*arguments(root, mix(PLACE)))
    assert outcome.code == 0 and commit in outcome.out, outcome
    after = snapshot(root)
    assert {n for n in before if after.get(n) != before[n]} <= {
        "report/report.json",
        "report/report.html",
    }
    outcome = invoke(*arguments(root, mix(f"{PLACE}@main")))
    assert outcome.code == 2 and "calibration documents' digest" in outcome.err, (
        "other words are looked up anew"
    )


def test_hub_that_is_away_ends_the_job_with_what_was_asked(hub: Hub, tmp_path: Path) -> None:
    hub.commit(DATA, data_set())
    hub.faults += [Fault(".*", 503)] * retry.HUB.attempts
    outcome = invoke(*arguments(tmp_path / "run", mix(PLACE)))
    assert outcome.code == 1 and "hf://datasets/owner/texts: the Hub answered 503" in outcome.err, (
        outcome
    )
    assert not (tmp_path / "run").exists()


def test_fewer_tokens_than_a_sequence_are_refused_by_place(hub: Hub, tmp_path: Path) -> None:
    hub.commit(DATA, {"a.jsonl": b'{"text": "few"}\n{"text": ""}\n'})
    outcome = invoke(*arguments(tmp_path / "run", ROUNDED | {"calibration.documents": PLACE}))
    assert outcome.code == 2, outcome
    assert (
        "calibration.documents: hf://datasets/owner/texts" in outcome.err
        and "expected text for 4 sequences of 64 tokens, found 0" in outcome.err
    )
