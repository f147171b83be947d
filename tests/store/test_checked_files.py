"""Files of a node that are held against their digests once: by threads, by processes, by one that
comes after a dead one; and again when they change."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from p48ray.store.checked_files import CheckedFiles, note_name

SPAWN = multiprocessing.get_context("spawn")
WAIT_S = 60.0
DATA = b"some columns"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


@pytest.fixture(params=["process", "node"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where notes go; None: this process keeps its own."""
    return notes_folder(tmp_path) if request.param == "node" else None


def notes_folder(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.mkdir(exist_ok=True)
    return path


def refuse() -> None:
    raise AssertionError("nothing should be hashed")


def is_checked(files: CheckedFiles, path: Path, sha256: str = DIGEST) -> bool:
    """Whether this look at the file had it hashed."""
    calls: list[int] = []
    files.check_once(os.stat(path), sha256, lambda: calls.append(1))
    return bool(calls)


def test_a_file_is_checked_once(file: Path, folder: Path | None) -> None:
    files = CheckedFiles(folder)
    assert [is_checked(files, file) for _ in range(3)] == [True, False, False]


def test_what_this_process_wrote_is_not_checked(file: Path, folder: Path | None) -> None:
    files = CheckedFiles(folder)
    files.trust(str(file), os.stat(file).st_ino, len(DATA), DIGEST)
    files.check_once(os.stat(file), DIGEST, refuse)


def test_what_another_put_in_its_place_meanwhile_is_checked(
    file: Path, folder: Path | None
) -> None:
    files = CheckedFiles(folder)
    file.write_bytes(DATA + b" of another")
    files.trust(str(file), os.stat(file).st_ino, len(DATA), DIGEST)
    assert is_checked(files, file)


def test_trust_in_a_file_that_is_gone_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CheckedFiles().trust(str(tmp_path / "gone"), 1, 1, DIGEST)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def rewrite_and_hide_it(path: Path) -> None:
    """The time of the last write can be set; that of the last change can not."""
    before = os.stat(path)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def put_another_there(path: Path) -> None:
    before = os.stat(path)
    other = path.with_suffix(".other")
    other.write_bytes(DATA)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize(
    "change",
    [rewrite, rewrite_and_hide_it, put_another_there, cut],
    ids=lambda change: change.__name__,
)
def test_a_changed_file_is_checked_again(
    change: Callable[[Path], None], file: Path, folder: Path | None
) -> None:
    files = CheckedFiles(folder)
    assert is_checked(files, file)
    time.sleep(0.02)  # a kernel's clock for files goes by ticks
    change(file)
    assert [is_checked(files, file) for _ in range(2)] == [True, False]


def test_another_digest_of_the_same_file_is_checked(file: Path, folder: Path | None) -> None:
    files = CheckedFiles(folder)
    assert (
        is_checked(files, file)
        and is_checked(files, file, "f" * 64)
        and not is_checked(files, file)
    )


def test_a_failing_check_is_told_and_tried_again_by_the_next(
    file: Path, folder: Path | None
) -> None:
    files = CheckedFiles(folder)

    def fail() -> None:
        raise ValueError("other bytes")

    for _ in range(2):
        with pytest.raises(ValueError, match="other bytes"):
            files.check_once(os.stat(file), DIGEST, fail)
    assert [is_checked(files, file) for _ in range(2)] == [True, False]


def test_threads_wait_for_the_one_that_checks(file: Path, folder: Path | None) -> None:
    files, calls, done = CheckedFiles(folder), [], []

    def check() -> None:
        calls.append(1)
        time.sleep(0.2)
        done.append(1)

    def look() -> None:
        files.check_once(os.stat(file), DIGEST, check)
        assert done, "went on before the check had ended"
        passed.append(1)

    passed: list[int] = []
    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(calls) == 1 and len(passed) == 6


def test_of_threads_that_wait_one_tries_again_when_the_check_failed(
    file: Path, folder: Path | None
) -> None:
    files, calls, outcomes = CheckedFiles(folder), [], []

    def check() -> None:
        calls.append(1)
        time.sleep(0.1)
        if len(calls) == 1:
            raise ValueError("could not be read")

    def look() -> None:
        try:
            files.check_once(os.stat(file), DIGEST, check)
            outcomes.append("checked")
        except ValueError:
            outcomes.append("failed")

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(outcomes) == ["checked"] * 3 + ["failed"] and len(calls) == 2


# Processes of one node.


def test_processes_of_a_node_share_notes_and_keep_them_apart_from_others(
    file: Path, tmp_path: Path
) -> None:
    first, second = CheckedFiles(notes_folder(tmp_path)), CheckedFiles(notes_folder(tmp_path))
    assert is_checked(first, file) and not is_checked(second, file)
    assert is_checked(CheckedFiles(), file), "a process without a folder has its own"


def test_a_note_that_was_lost_costs_one_more_reading(file: Path, tmp_path: Path) -> None:
    folder = notes_folder(tmp_path)
    assert is_checked(CheckedFiles(folder), file)
    (folder / f"{note_name(os.stat(file), DIGEST)}.checked").unlink()
    assert is_checked(CheckedFiles(folder), file) and not is_checked(CheckedFiles(folder), file)


def look_from_a_process(
    folder: str, path: str, log: str, here: Event, begun: Event, go: Event
) -> None:
    """Check the file, slowly; a line in the log for every check, and one for every look that has
    come to its end."""
    here.set()

    def check() -> None:
        begun.set()
        assert go.wait(WAIT_S)
        with open(log, "a") as lines:
            lines.write("hashed\n")

    CheckedFiles(folder).check_once(os.stat(path), DIGEST, check)
    with open(log, "a") as lines:
        lines.write("read\n")


def test_of_two_processes_at_once_one_checks_and_the_other_waits(
    file: Path, tmp_path: Path
) -> None:
    folder, log = notes_folder(tmp_path), tmp_path / "log"
    there, here, begun, again, go = (SPAWN.Event() for _ in range(5))
    first = SPAWN.Process(
        target=look_from_a_process, args=(str(folder), str(file), str(log), there, begun, go)
    )
    first.start()
    assert begun.wait(WAIT_S)
    second = SPAWN.Process(
        target=look_from_a_process, args=(str(folder), str(file), str(log), here, again, go)
    )
    second.start()
    assert here.wait(WAIT_S)
    assert not again.wait(0.5), "the second checks too"
    assert not log.exists(), "nobody has read what nobody has checked"
    go.set()
    for process in (first, second):
        process.join(WAIT_S)
        assert process.exitcode == 0
    assert sorted(log.read_text().split()) == ["hashed", "read", "read"]
    assert log.read_text().startswith("hashed")


def test_a_checker_that_is_killed_lets_the_next_one_check(file: Path, tmp_path: Path) -> None:
    folder, log = notes_folder(tmp_path), tmp_path / "log"
    here, begun, go = (SPAWN.Event() for _ in range(3))
    process = SPAWN.Process(
        target=look_from_a_process, args=(str(folder), str(file), str(log), here, begun, go)
    )
    process.start()
    assert begun.wait(WAIT_S) and process.pid
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(is_checked(CheckedFiles(folder), file)))
    waiting.start()
    time.sleep(0.2)
    assert not found, "waits while the other process lives"
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(WAIT_S)
    process.join(WAIT_S)
    assert found == [True] and not log.exists()
    assert not is_checked(CheckedFiles(folder), file)


def test_a_file_that_another_put_in_its_place_is_not_trusted(file: Path, tmp_path: Path) -> None:
    """Of the same size, between the writing of ours and the note of it."""
    ours = os.stat(file).st_ino
    other = tmp_path / "other"
    other.write_bytes(DATA[::-1])
    os.replace(other, file)
    files, calls = CheckedFiles(), list[int]()
    files.trust(str(file), ours, len(DATA), DIGEST)
    files.check_once(os.stat(file), DIGEST, lambda: calls.append(1))
    assert calls == [1]
