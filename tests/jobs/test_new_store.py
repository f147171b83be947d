"""A kind of store that the package has never heard of, registered in one place, in a whole job."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.config.load import load_config
from p48ray.store import SCHEMES, MemoryStore, Scheme, Store, open_store, scheme_of
from p48ray.store.view import SubStore
from tests.conftest import TINY
from tests.jobs.command import (
    CONFIG,
    HELD_OUT,
    ROUNDED,
    arguments,
    invoke,
    narrow_model,
    own_logging,
    small,
)

ROOT, SOURCE, TEXTS = "mem2://runs/narrow", "mem2://model", "mem2://texts"


class ThrowawayStore(SubStore):
    """Objects of this process: every place is a folder of one store in memory."""

    def __init__(self, place: str) -> None:
        super().__init__(MemoryStore("throwaway"), f"{place.partition('://')[2].strip('/')}/")
        self.uri = place


def fill(store: Store, folder: Path, names: list[str]) -> None:
    for name in names:
        store.put(name, (folder / name).read_bytes())


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The one place. Yields settings of a small run that has nothing on a disk."""
    kind = Scheme(
        name="mem2",
        noun="a throwaway",
        example="mem2://name",
        open=lambda place, *_: ThrowawayStore(place),
        must_be_probed=True,
    )
    monkeypatch.setitem(SCHEMES, "mem2", kind)
    fill(open_store(SOURCE), narrow_model(), [p.name for p in narrow_model().iterdir()])
    fill(open_store(TEXTS), TINY, ["calibration.jsonl", "heldout.jsonl"])
    yield ROUNDED | {
        "source.checkpoint": SOURCE,
        "calibration.documents": f"{TEXTS}/calibration.jsonl",
        "evaluation": HELD_OUT.replace("examples/tiny-kimi-k2.5", TEXTS),
    }
    for place in (ROOT, SOURCE, TEXTS):
        store = open_store(place)
        for info in list(store.list()):
            store.delete(info.key)


def asked(*args: str) -> tuple[int, str]:
    """A question of `p48ray`: exit code, and all that it printed."""
    with own_logging():
        result = CliRunner().invoke(app, args)
    return result.exit_code, result.output


@pytest.mark.slow
def test_it_goes_through_the_whole_job(registered: dict[str, str]) -> None:
    """Config, dry run with the estimate, run, report, status, verification."""
    settings = small() | registered
    config = load_config(CONFIG, tuple(f"{key}={value}" for key, value in settings.items()), ROOT)
    assert (config.run.root, scheme_of(config.run.root).noun) == (ROOT, "a throwaway")

    dry = invoke(*arguments(ROOT, registered), "--dry-run")
    assert dry.code == 0, dry
    assert "a node a layer once for all its units" in dry.out, "it lies afar"
    store = open_store(ROOT)
    assert not list(store.list())

    done = invoke(*arguments(ROOT, registered))
    assert done.code == 0, done
    keys = {info.key for info in store.list()}
    assert {"plan.json", "store.json", "checkpoint/model.safetensors.index.json"} <= keys
    assert b"round_to_nearest" in store.get("report/report.html")

    code, said = asked("status", ROOT)
    assert code == 0 and "complete" in said, said
    code, said = asked("verify", f"{ROOT}/checkpoint", "--source", SOURCE)
    assert (code, '"problems": []' in said) == (0, True), said


@pytest.mark.slow
def test_its_checkpoint_is_a_local_runs(registered: dict[str, str], tmp_path: Path) -> None:
    assert invoke(*arguments(ROOT, registered)).code == 0
    local = ROUNDED | {
        "calibration.documents": str(TINY / "calibration.jsonl"),
        "evaluation": HELD_OUT,
    }
    assert invoke(*arguments(tmp_path / "run", local)).code == 0
    store = open_store(ROOT)
    shards = sorted((tmp_path / "run" / "checkpoint").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert store.get(f"checkpoint/{shard.name}") == shard.read_bytes(), shard.name


def test_without_its_entry_it_is_a_stranger() -> None:
    refused = invoke(*arguments(ROOT, ROUNDED))
    assert refused.code == 2 and "found 'mem2://runs/narrow'" in refused.err
    code, said = asked("status", ROOT)
    assert code == 2 and "unknown scheme mem2://; known are a plain path, file://" in said
