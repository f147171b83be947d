"""A checkpoint of before gets the list of linears that are not quantized, and nothing else."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.errors import ConfigError, ShardCorruptError
from p48ray.finished.config_update import fill_ignore
from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.run.checkpoint_manifest import CheckpointManifest
from tests.stages.damage import Folder
from tests.stages.small_run import SmallRun

CONFIG, MANIFEST = "config.json", "p48ray.json"


def edited(folder: Folder, file: str, **changes: object) -> Folder:
    """With other values in quantization_config."""
    config = json.loads(folder.files[file])
    config["quantization_config"] |= changes
    return folder.with_file(
        file, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    )


def of_before(folder: Folder) -> Folder:
    """As a version wrote it that named no linear."""
    emptied = edited(folder, CONFIG, ignore=[])
    digest = hashlib.sha256(emptied.files[CONFIG]).hexdigest()
    manifest = CheckpointManifest.from_json(folder.files[MANIFEST], MANIFEST)
    digests = manifest.file_sha256 | {CONFIG: digest}
    sealed = manifest.model_copy(update={"file_sha256": digests}).sealed()
    return emptied.with_file(MANIFEST, sealed.to_json())


@pytest.fixture(params=["dense", "sparse"])
def today(finished: SmallRun, request: pytest.FixtureRequest) -> Folder:
    folder = Folder.read(finished.checkpoint)
    if request.param == "dense":
        return folder
    target = Folder({}).store()
    convert_folder(folder.store(), target, "sparse", None)
    return Folder({info.key: target.get(info.key) for info in target.list()})


def updated(folder: Folder) -> Folder:
    store = folder.store()
    fill_ignore(store)
    return Folder({info.key: store.get(info.key) for info in store.list()})


def test_updated_checkpoint_is_byte_for_byte_what_this_version_writes(today: Folder) -> None:
    before = of_before(today)
    assert before.changed_from(today) == [CONFIG, MANIFEST]
    assert verify_folder(before.store(), None).problems == ()
    after = updated(before)
    assert after.changed_from(today) == []
    assert verify_folder(after.store(), None).problems == ()
    assert len(json.loads(after.files[CONFIG])["quantization_config"]["ignore"]) > 1


def test_up_to_date_is_left_alone(today: Folder) -> None:
    store = today.store()
    store.put = lambda *_: pytest.fail("written")  # type: ignore[method-assign]
    assert not fill_ignore(store).is_new


def test_update_that_was_interrupted_behind_config_json_goes_on(today: Folder) -> None:
    half = of_before(today).with_file(CONFIG, today.files[CONFIG])
    assert verify_folder(half.store(), None).problems != ()
    assert updated(half).changed_from(today) == []


def refused(folder: Folder, error: type[Exception], words: str) -> None:
    store = folder.store()
    with pytest.raises(error, match=words):
        fill_ignore(store)
    assert Folder({i.key: store.get(i.key) for i in store.list()}).changed_from(folder) == []


@pytest.fixture
def dense(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


def test_files_that_somebody_changed_are_refused_by_name(dense: Folder) -> None:
    old = of_before(dense)
    refused(
        edited(old, CONFIG, quantization_status="frozen"),
        ShardCorruptError,
        r"config\.json: expected SHA",
    )
    edited_too = edited(dense, CONFIG, quantization_status="frozen")
    refused(
        old.with_file(CONFIG, edited_too.files[CONFIG]),
        ShardCorruptError,
        r"config\.json: expected SHA",
    )
    refused(
        old.with_file("generation_config.json", b"{}\n"),
        ShardCorruptError,
        r"generation_config\.json: expected SHA",
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["lm_head"], r"ignore: expected an empty list or the \d patterns .*found \['lm_head'\]"),
        (None, r"quantization_config\.ignore: expected a list, found None"),
    ],
)
def test_another_list_is_refused(dense: Folder, found: object, words: str) -> None:
    refused(edited(dense, CONFIG, ignore=found), ConfigError, words)


def test_folder_of_another_program_is_refused(dense: Folder) -> None:
    files = {name: data for name, data in dense.files.items() if name != MANIFEST}
    refused(Folder(files), ConfigError, r"expected the checkpoint/ folder of a p48ray run")
    plain = json.loads(dense.files[CONFIG])
    del plain["quantization_config"]
    refused(
        dense.with_file(CONFIG, json.dumps(plain).encode()),
        ShardCorruptError,
        r"config\.json: quantization_config\.format: expected 'nvfp4-pack-quantized', .*found None",
    )


def test_command_says_what_it_has_done(dense: Folder, tmp_path: Path) -> None:
    for name, data in of_before(dense).files.items():
        (tmp_path / name).write_bytes(data)
    run = CliRunner().invoke(app, ["update-config", str(tmp_path)])
    assert run.exit_code == 0
    assert f"wrote {tmp_path}/config.json and its digest in p48ray.json" in run.output
    assert (tmp_path / CONFIG).read_bytes() == dense.files[CONFIG]
    again = CliRunner().invoke(app, ["update-config", str(tmp_path)])
    assert again.exit_code == 0 and "up to date; nothing was written" in again.output
    assert CliRunner().invoke(app, ["update-config", str(tmp_path / "none")]).exit_code == 2
