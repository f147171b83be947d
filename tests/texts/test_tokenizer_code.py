"""A tokenizer that is code on top of tiktoken, as Kimi's is: from a folder, a bucket, the Hub
and the mirror, and only where it is trusted."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from p48ray.checkpoint.index import open_checkpoint
from p48ray.config.documents import DocumentSource
from p48ray.errors import SourceError
from p48ray.run import arrow
from p48ray.store import HubStore, LocalStore, Store, open_store
from p48ray.texts.sequences import load_sequences, load_tokenizer
from tests.jobs.command import ROUNDED, arguments, invoke
from tests.servers.hub import MODEL, Hub, tiny_files
from tests.servers.s3 import BUCKET, Server
from tests.texts.packed import packed
from tests.texts.tiktoken_source import MERGES, NUM_RANKS, model_files

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("module_cache")]


TEXT = "the rain in Ünterland 'ther'"


def fill(store: Store) -> Store:
    for name, data in model_files(tiny_files()).items():
        store.put(name, data)
    return store


@pytest.fixture(params=["folder", "bucket", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The small model with that tokenizer, in each place that a source may lie in."""
    if request.param == "folder":
        return fill(LocalStore(tmp_path / "model"))
    if request.param == "bucket":
        request.getfixturevalue("aws_identity")
        server: Server = request.getfixturevalue("moto_server")
        return fill(open_store(f"s3://{BUCKET}/tokenizer-code", server.endpoint_url))
    request.getfixturevalue("hub").commit(MODEL, model_files(tiny_files()))
    return HubStore("hf://owner/tiny")


def slow_bpe(text: bytes) -> list[int]:
    """Byte pair encoding by its definition: merge the neighbours whose union has the lowest rank,
    until none has one."""
    ranks = {token: 256 + i for i, token in enumerate(MERGES)} | {bytes([i]): i for i in range(256)}
    parts = [bytes([b]) for b in text]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[p] for p in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def words(text: str) -> list[bytes]:
    import regex

    return [w.encode() for w in regex.findall(r"\w+|\s+|[^\w\s]+", text)]


def test_trusted_code_tokenizes_as_its_ranks_say(place: Store) -> None:
    tokenizer = load_tokenizer(open_checkpoint(place), trust_remote_code=True)
    expected = [i for word in words(TEXT) for i in slow_bpe(word)]
    assert max(expected) >= 256, "a text without a merge would prove little"
    assert packed([TEXT], tokenizer, 1 + len(expected)).tolist() == [[NUM_RANKS, *expected]]
    assert tokenizer.decode(expected) == TEXT


def test_chats_go_through_its_template_with_one_bos(place: Store, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(place), trust_remote_code=True)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "the"}]}) + "\n")
    turn = [NUM_RANKS + 2, *(i for w in words("user: the") for i in slow_bpe(w)), NUM_RANKS + 1]
    rows = load_sequences(
        [DocumentSource(path=str(path))], tokenizer, 1, 1 + len(turn), 0, 2048, "calibration"
    )
    assert rows.tolist() == [[NUM_RANKS, *turn]]


def test_untrusted_code_is_refused_with_the_hint_and_does_not_run(
    place: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if "tokenization_ranks" in m]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        SourceError, match=r"the tokenizer can not be loaded.*set source\.trust_remote_code: true"
    ):
        load_tokenizer(open_checkpoint(place), trust_remote_code=False)
    assert not [m for m in sys.modules if "tokenization_ranks" in m]


def test_missing_tiktoken_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(LocalStore(tmp_path / "model"))
    for name in [
        m for m in sys.modules if "tokenization_ranks" in m or m.partition(".")[0] == "tiktoken"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(
        SourceError,
        match=r"needs tiktoken, which is not installed here: pip install 'tiktoken>=0\.14'",
    ):
        load_tokenizer(open_checkpoint(store), trust_remote_code=True)


class Absent:
    """A finder that knows of no tiktoken, and keeps others from finding it."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "tiktoken":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_job_from_the_hub_tokenizes_and_carries_the_code_over(hub: Hub, tmp_path: Path) -> None:
    files = model_files(tiny_files())
    hub.commit(MODEL, files)
    chat = tmp_path / "chat.jsonl"
    turns = [
        {"from": "human", "value": "the rain in the inn " * 20},
        {"from": "gpt", "value": "then the other one " * 20},
    ]
    chat.write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(8)))
    settings = ROUNDED | {
        "source.checkpoint": "hf://owner/tiny",
        "calibration.documents": str(chat),
    }
    refused = invoke(*arguments(tmp_path / "run", settings))
    assert refused.code == 2 and "source.trust_remote_code: true" in refused.err, refused
    assert not (tmp_path / "run").exists()
    root = tmp_path / "run"
    outcome = invoke(*arguments(root, settings | {"source.trust_remote_code": "true"}))
    assert outcome.code == 0, outcome
    for name in ("tokenization_ranks.py", "tiktoken.model", "tokenizer_config.json"):
        assert (
            (root / "source" / name).read_bytes()
            == (root / "checkpoint" / name).read_bytes()
            == files[name]
        )
    ids = arrow.decode((root / "calibration" / "tokens.arrow").read_bytes(), "tokens")["token_ids"]
    assert int(ids.max()) < NUM_RANKS + 3 and int((ids == NUM_RANKS).sum()) > 0
    mirrored = load_tokenizer(open_checkpoint(LocalStore(root / "source")), trust_remote_code=True)
    assert "<|turn|>user: the rain" in mirrored.decode(ids.flatten().tolist())
