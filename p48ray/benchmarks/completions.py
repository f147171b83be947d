"""What a server says: greedy answers, and the log-probabilities that it gives a text.

Servers differ in what they take, so the way to ask is found by asking: a chat, where the model has
a template for it, else plain completions; the log-probabilities of a text only where the server can
echo a prompt.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal

from p48ray.errors import ConfigError

ANSWER_TIMEOUT_S = 600.0
ANSWER_TOKENS = 96
SAID_CHARACTERS = 200
"""Characters of a server's own message."""
NOT_JSON = "Out of range float values"
"""Of what Python's json says to a NaN, and vLLM then to its client, with HTTP 400."""
Way = Literal["chat", "plain"]
FIELDS = ("reasoning_content", "reasoning", "content")
"""Of a chat's answer: servers that part thoughts from words may leave the words empty."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A server under one of its models."""

    url: str
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """`flaw`: what is wrong with it as an answer at all, whatever it says."""

    text: str
    flaw: str | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of a text's tokens but the first, and at each place the token that was the
    likeliest (None: not told)."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    first: tuple[str | None, ...]

    @property
    def mean(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.logprobs))


@dataclass(frozen=True, slots=True)
class Unscored:
    """Why there are none. `is_fault`: the server broke, rather than not know how."""

    reason: str
    is_fault: bool = False


def takes_chats(server: Asked, prompt: str) -> bool:
    """Whether it has a chat template for the model: one that has none refuses the request."""
    try:
        post(server, "chat/completions", {**chat(prompt), "max_tokens": 1})
    except urllib.error.HTTPError as error:
        return error.code >= 500  # which is a fault of another kind
    except (ValueError, LookupError, TypeError):
        return True
    return True


def chat(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


def answer(server: Asked, prompt: str, way: Way) -> Answer:
    """Its greedy answer, cut short. Raises: ConfigError where nobody answers any more."""
    path, question = (
        ("chat/completions", chat(prompt))
        if way == "chat"
        else ("completions", {"prompt": f"{prompt}\n"})
    )
    try:
        reply = post(server, path, {**question, "max_tokens": ANSWER_TOKENS})
        choice = reply["choices"][0]
        if way == "plain":
            return Answer(str(choice["text"] or ""))
        return Answer("".join(str(choice["message"].get(name) or "") for name in FIELDS))
    except urllib.error.HTTPError as error:
        return Answer("", said_no(error))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Answer("", f"no answer as OpenAI's API has it: {error!r}"[:SAID_CHARACTERS])


def score(server: Asked, text: str) -> Scores | Unscored:
    """How likely it finds a text. What is not finite stays in."""
    question = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1}
    try:
        found = post(server, "completions", question)["choices"][0]["logprobs"]
        # the first token has nothing before it, the last is the one that was generated
        tokens = tuple(str(token) for token in found["tokens"][1:-1])
        logprobs = tuple(
            math.nan if value is None else float(value) for value in found["token_logprobs"][1:-1]
        )
        told = (found.get("top_logprobs") or [None] * (len(tokens) + 2))[1:-1]
    except urllib.error.HTTPError as error:
        reason = said_no(error)
        return Unscored(reason, error.code >= 500 or NOT_JSON in reason)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Unscored(f"no log-probabilities of a prompt: {error!r}"[:SAID_CHARACTERS])
    if not tokens or not len(tokens) == len(logprobs) == len(told):
        return Unscored("no log-probabilities of a prompt: it is not echoed")
    return Scores(tokens, logprobs, tuple(map(likeliest, told)))


def likeliest(told: Mapping[str, float | None] | None) -> str | None:
    """Of a place's tokens with their log-probabilities."""
    finite = {token: value for token, value in (told or {}).items() if value is not None}
    return max(finite, key=finite.__getitem__, default=None)


def said_no(error: urllib.error.HTTPError) -> str:
    """A server's said_no in a line."""
    with error:
        said = " ".join(error.read(4 * SAID_CHARACTERS).decode("utf-8", "replace").split())
    return f"HTTP {error.code}: {said[:SAID_CHARACTERS]}"


def post(server: Asked, path: str, question: Mapping[str, Any]) -> Any:
    """The parsed reply. Raises: HTTPError for a said_no, ValueError for what is no JSON,
    ConfigError where no server answers."""
    body = {"model": server.model, "temperature": 0, **question}
    request = urllib.request.Request(
        f"{server.url}/v1/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError:
        raise
    except (OSError, HTTPException) as error:
        raise ConfigError(
            f"{server.url}/v1/{path}: expected an answer of the server, which has listed its models"
            f" before, found {error!r}"
        ) from error
