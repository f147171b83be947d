"""A first look at a server of a checkpoint: twenty prompts, what looks broken in the answers, and
how far the log-probabilities are from those of a reference.

It proves nothing about quality (that is `jobs/evaluate.py`'s). It finds the faults that a wrong
loader makes: empty answers, one piece over and over, numbers that are none, text that no model that
works finds unlikely.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from statistics import fmean

from p48ray.benchmarks.completions import (
    Answer,
    Asked,
    Scores,
    Unscored,
    Way,
    answer,
    score,
    takes_chats,
)
from p48ray.benchmarks.server_process import model_named, served_models
from p48ray.errors import ConfigError
from p48ray.store.open import scheme_of

PROMPTS = (
    "What is the capital of France?",
    "What is 17 + 25? Answer with the number alone.",
    "Name three animals that can fly.",
    "Translate into German: The house is old.",
    "Translate into French: I would like a cup of tea.",
    "Write a Python function that reverses a string.",
    "Who wrote the play Hamlet?",
    "Explain in one sentence why the sky is blue.",
    "Give the first eight prime numbers.",
    "What does HTTP stand for?",
    "Continue the story: The old lighthouse had been dark for years, until one night",
    "Write a JSON object with the keys name and age for a person called Ada.",
    "Which planet is the largest of the solar system?",
    "Write a SQL query that counts the rows of a table called users.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "List the days of the week in Spanish.",
    "Summarize in a few words: The meeting was moved from Monday to Thursday because the speaker"
    " is ill, and it will take place in the large room instead of the small one.",
    "A train leaves at 9:40 and arrives at 11:05. How many minutes does it take?",
    "Write a haiku about rain.",
    "What is the chemical symbol of gold, and why?",
)
AT_ONCE = 8
"""Requests to both servers together."""
WIDE_NATS = 2.0
"""A token by which a text is less likely than to the reference: four bits instead of sixteen cost
0.1 to 0.3, another model's weights or lost scales several."""
REPEATED_CHARACTERS, REPEATS = 32, 4
"""Of an answer's end that is one piece again and again, and covers at least half of it."""
SAME_ANSWERS = 4
GARBAGE_SHARE = 0.2
"""Of an answer's characters that no text has: replacements of broken bytes, control characters."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt with its answers. `flaws`: what looks broken in the server's."""

    prompt: str
    server: Answer
    reference: Answer | None
    scores: tuple[Scores | Unscored, Scores | Unscored | None]
    flaws: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the texts that both servers cut into the same tokens: how far the log-probabilities of a
    token are apart on average, by how much the server's are lower, and how often both find the same
    token the likeliest (None: not told)."""

    num_texts: int
    num_tokens: int
    apart: float
    lower: float
    same_first: float | None


@dataclass(frozen=True, slots=True)
class Smoke:
    """All that was asked."""

    way: Way
    server: Asked
    reference: Asked | None
    compared: tuple[Compared, ...]

    @property
    def num_flawed(self) -> int:
        return sum(bool(c.flaws) for c in self.compared)

    @property
    def agreement(self) -> Agreement | None:
        pairs = [pair for c in self.compared if (pair := comparable(*c.scores))]
        if not pairs:
            return None
        lower = [y - x for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True)]
        firsts = [pair for a, b in pairs for pair in zip(a.first, b.first, strict=True)]
        told = [x == y for x, y in firsts if x is not None and y is not None]
        return Agreement(
            num_texts=len(pairs),
            num_tokens=len(lower),
            apart=fmean(map(abs, lower)),
            lower=fmean(lower),
            same_first=fmean(told) if told else None,
        )


def comparable(a: Scores | Unscored, b: Scores | Unscored | None) -> tuple[Scores, Scores] | None:
    """Both servers' scores of a text, where they are of the same tokens."""
    if not isinstance(a, Scores) or not isinstance(b, Scores):
        return None
    return (a, b) if a.tokens == b.tokens and a.is_finite and b.is_finite else None


def run_smoke(
    checkpoint: str, url: str, reference_url: str | None = None, served_name: str | None = None
) -> Smoke:
    """Ask every prompt.

    Args:
        checkpoint: as the server was given it: a folder, or owner/name.
        url: of the server, with or without /v1.
        reference_url: of a server of what it should answer like; it has one model.
        served_name: the server's id for the checkpoint, where it is neither.
    Raises: ConfigError where a server does not answer, or serves something else.
    """
    server = find_served(url, checkpoint, served_name)
    reference = find_only(reference_url) if reference_url is not None else None
    asked = [s for s in (server, reference) if s is not None]
    way: Way = "chat" if all(takes_chats(s, PROMPTS[0]) for s in asked) else "plain"
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def ask(who: Asked) -> Iterator[Answer]:
            return pool.map(lambda prompt: answer(who, prompt, way), PROMPTS)

        # both are asked before either is waited for
        own, theirs = ask(server), ask(reference) if reference else repeat(None, len(PROMPTS))
        answers = list(zip(own, theirs, strict=True))
        # what the reference wrote: text that a model which works finds likely
        texts = [f"{p}\n{(b or a).text}" for p, (a, b) in zip(PROMPTS, answers, strict=True)]

        def rate(who: Asked) -> Iterator[Scores | Unscored]:
            return pool.map(lambda text: score(who, text), texts)

        own_scores = rate(server)
        their_scores = rate(reference) if reference else repeat(None, len(PROMPTS))
        scores = list(zip(own_scores, their_scores, strict=True))
    seen = Counter(a.text.strip() for a, _ in answers)
    seen_of_reference = Counter(b.text.strip() for _, b in answers if b is not None)
    compared = []
    for prompt, (a, b), rated in zip(PROMPTS, answers, scores, strict=True):
        excused = set(looks_broken(b, seen_of_reference)) if b is not None else set()
        flaws = [f for f in looks_broken(a, seen) if f not in excused]
        compared.append(Compared(prompt, a, b, rated, (*flaws, *scored_badly(*rated))))
    return Smoke(way, server, reference, tuple(compared))


def find_served(url: str, checkpoint: str, served_name: str | None) -> Asked:
    """The server's model that is the checkpoint, by its id or by the place it was loaded from."""
    base = base_url(url)
    served = served_models(base)
    place = scheme_of(checkpoint).served
    wanted = {served_name} if served_name else {checkpoint, place(checkpoint)[0] if place else ""}
    model = model_named(served, wanted)
    if model is None:
        found = ", ".join(f"{m.id!r} from {m.root!r}" for m in served) or "nothing"
        raise ConfigError(
            f"{url}: expected a server of {served_name or checkpoint!r}, it serves {found}; give"
            " the server's id for the checkpoint with --served-name"
        )
    return Asked(base, model.id)


def find_only(url: str) -> Asked:
    """The one model of a reference, which may be any."""
    base = base_url(url)
    served = served_models(base)
    if len(served) != 1:
        raise ConfigError(
            f"{url}: expected a reference with one model, found {len(served)}:"
            f" {', '.join(repr(m.id) for m in served)}"
        )
    return Asked(base, served[0].id)


def base_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def looks_broken(found: Answer, seen: Counter[str]) -> Iterator[str]:
    """What is wrong with an answer by itself. seen: how often each was given."""
    text = found.text.strip()
    if found.flaw is not None:
        yield found.flaw
    elif not text:
        yield "empty"
    elif is_repeated(text):
        yield "repeated"
    elif seen[text] >= SAME_ANSWERS:
        yield "the same answer to many prompts"
    elif sum(map(is_garbage, text)) > GARBAGE_SHARE * len(text):
        yield "no text"


def scored_badly(server: Scores | Unscored, reference: Scores | Unscored | None) -> Iterator[str]:
    """What is wrong with the log-probabilities of a text."""
    if isinstance(server, Unscored):
        if server.is_fault:
            yield f"log-probabilities: {server.reason}"
    elif not server.is_finite:
        yield "a log-probability that is not a number"
    elif pair := comparable(server, reference):
        less = pair[1].mean - pair[0].mean
        if less > WIDE_NATS:
            yield f"the reference's answer is less likely to it, by {less:.1f} nats a token"


def is_repeated(text: str) -> bool:
    """Whether an answer ends in one piece over and over."""
    needed = max(REPEATED_CHARACTERS, len(text) // 2)
    for period in range(1, len(text) // REPEATS + 1):
        length = period
        while length < len(text) and text[-1 - length] == text[-1 - length + period]:
            length += 1
        if length >= max(needed, REPEATS * period):
            return True
    return False


def is_garbage(character: str) -> bool:
    return character == "\ufffd" or (
        not character.isspace() and unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")
    )
