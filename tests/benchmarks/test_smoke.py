"""p48ray smoke, against server processes that answer sense, and that answer wrongly in every way it
looks for."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from p48ray.benchmarks.server_process import ServerProcess, free_port
from p48ray.benchmarks.smoke import PROMPTS, is_repeated
from p48ray.cli import app
from tests.conftest import REPO

Start = Callable[..., str]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a server with these words, once for the same, and gives its URL."""
    running: dict[tuple[str, ...], str] = {}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))

        def started(*words: str) -> str:
            if words not in running:
                server = ServerProcess(
                    [sys.executable, "-m", "tests.benchmarks.smoke_server", *words]
                )
                stack.callback(server.end)
                deadline = time.monotonic() + 60
                while not server.state().is_healthy:
                    assert time.monotonic() < deadline, server.last_lines()
                    time.sleep(0.05)
                running[words] = server.url
            return running[words]

        yield started


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["smoke", *arguments], env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_sense_is_shown_beside_the_references_and_agrees(start: Start) -> None:
    server, reference = start("a/model"), start("b/model", "--logprob", "-0.75")
    result = call("a/model", "--server", f"{server}/v1/", "--reference", reference)
    assert result.exit_code == 0, result.output
    out = " ".join(result.output.split())
    assert f"a/model at {server}" in out and f"b/model at {reference}" in out
    assert "greedy answers, as chats" in out and out.count("An answer") == 2 * len(PROMPTS)
    assert "0.2500 nats a token apart (the server's lower by -0.2500)" in out
    assert f"of {len(PROMPTS)} texts; the same first choice at 100.0%" in out
    assert out.endswith(f"nothing looks broken in {len(PROMPTS)} prompts")


BROKEN = {
    "loops": (["--says", "loops"], "repeated"),
    "marks": (["--says", "marks"], "repeated"),
    "nothing": (["--says", "nothing"], "empty"),
    "garbage": (["--says", "garbage"], "no text"),
    "the same": (["--says", "the same"], "the same answer to many prompts"),
    "NaN": (["--logprob", "NaN"], "a log-probability that is not a number"),
    "null": (["--logprob", "null"], "a log-probability that is not a number"),
    "infinite": (["--logprob=-Infinity"], "a log-probability that is not a number"),
    "scores": (["--breaks", "scores"], "log-probabilities: HTTP 500"),
    "floats": (["--breaks", "floats"], 'log-probabilities: HTTP 400: {"message": "Out of range'),
    "answers": (["--breaks", "answers"], "HTTP 500"),
    "json": (["--breaks", "json"], "no answer as OpenAI's API has it: JSONDecodeError"),
    "choices": (["--breaks", "choices"], "no answer as OpenAI's API has it: KeyError('choices')"),
}


@pytest.mark.parametrize("way", ["chat", "plain", "beside a reference"])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_looks_broken_is_named_for_every_prompt(kind: str, way: str, start: Start) -> None:
    words, flaw = BROKEN[kind]
    server = start("a/model", *words, *(["--no-chat"] if way == "plain" else []))
    reference = ["--reference", start("a/model")] if way.startswith("beside") else []
    result = call("a/model", "--server", server, *reference)
    assert result.exit_code == 1, result.output
    out = " ".join(result.output.split())
    assert f"{len(PROMPTS)} of {len(PROMPTS)} prompts look broken" in out
    listed = [line for line in result.output.splitlines() if line.startswith("  ")]
    assert len([line for line in listed if flaw in line]) == len(PROMPTS)
    assert ("no chat template" in out) == (way == "plain")
    assert "\x00" not in result.output and "\x1b[31m" not in result.output


def test_text_that_the_reference_finds_likelier_by_far_looks_broken(start: Start) -> None:
    server, reference = start("a/model", "--logprob", "-9.5"), start("a/model")
    result = call("a/model", "--server", server, "--reference", reference)
    assert result.exit_code == 1
    assert "the reference's answer is less likely to it, by 9.0 nats a token" in result.output


def test_what_the_reference_answers_too_is_no_flaw(start: Start) -> None:
    server = start("a/model", "--says", "loops")
    assert call("a/model", "--server", server, "--reference", server).exit_code == 0


def test_answer_that_is_all_thought_is_no_empty_one(start: Start) -> None:
    result = call("a/model", "--server", start("a/model", "--thinks"))
    assert result.exit_code == 0 and "An answer" in result.output


def test_server_that_echoes_nothing_is_said_and_no_flaw(start: Start) -> None:
    result = call("a/model", "--server", start("a/model", "--no-echo"))
    assert result.exit_code == 0
    assert (
        "the server gives none: no log-probabilities of a prompt: it is not echoed" in result.output
    )


def test_chat_goes_only_to_servers_that_both_have_a_template(start: Start) -> None:
    server, reference = start("a/model"), start("a/model", "--no-chat")
    result = call("a/model", "--server", server, "--reference", reference)
    assert result.exit_code == 0 and "plain completions" in result.output


def test_checkpoint_is_found_by_its_folder_or_by_the_id_that_is_given(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    at = str(tmp_path / "model")
    for place, *more in (
        (str(tmp_path / "link"),),
        ("/at/b",),
        ("elsewhere", "--served-name", "b"),
    ):
        result = call(place, "--server", start(at, "b"), *more)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        (["b/model"], [], "expected a server of 'a/model', it serves 'b/model' from '/at/b/model'"),
        (["a/model"], ["--served-name", "x"], "expected a server of 'x', it serves 'a/model'"),
    ],
)
def test_server_of_another_model_is_refused(
    words: list[str], more: list[str], expected: str, start: Start
) -> None:
    refused(call("a/model", "--server", start(*words), *more), expected, "--served-name")


def test_reference_of_several_models_is_refused(start: Start) -> None:
    result = call("b", "--server", start("b", "c"), "--reference", start("b", "c"))
    refused(result, "expected a reference with one model, found 2: 'b', 'c'")


@pytest.mark.parametrize("kind", ["gone", "no address", "no API", "reference"])
def test_server_that_does_not_answer_is_refused(kind: str, start: Start) -> None:
    gone = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    good = start("a/model")
    urls = {
        "gone": ["--server", gone],
        "no address": ["--server", "here"],
        "no API": ["--server", f"{good}/elsewhere"],
        "reference": ["--server", good, "--reference", gone],
    }
    refused(call("a/model", *urls[kind]), "/v1/models: expected the list of models of an OpenAI-")


def refused(result: Result, *words: str) -> None:
    """One error, exit code 2, nothing on the standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("!" * 32, True),
        ("!" * 31, False),
        ("A good start. " + "and then " * 8, True),
        ("x" * 200 + "ab" * 40, False),  # a loop, but less than half of it
        ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday", False),
        ("2, 3, 5, 7, 11, 13, 17, 19", False),
        ("", False),
    ],
)
def test_repetition_is_one_piece_over_at_least_half(text: str, expected: bool) -> None:
    assert is_repeated(text) == expected
