"""Greedy agreement in print: on the page, at a run's end."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from p48ray.stages.greedy import GreedyAgreement

Agreements = Mapping[str, GreedyAgreement]
"""By the names of checkpoints; the run's own is the last."""


class AgreementRow(NamedTuple):
    """One checkpoint's lengths in tokens; margins in nats, a dash where nothing differed."""

    name: str
    median: str
    reached_by_90: str
    never_differed: str
    margin_at_difference: str
    is_own: bool


COLUMNS = ("", "half of the prompts", "90 % of them", "never differed", "margin where it differs")


def agreement_rows(results: Agreements) -> list[AgreementRow]:
    last = len(results) - 1
    return [
        AgreementRow(
            name=name,
            median=length(a.median, a.tokens),
            reached_by_90=length(a.reached_by_90, a.tokens),
            never_differed=f"{a.never_differed:.1%}",
            margin_at_difference=(
                "-" if a.margin_at_difference is None else f"{a.margin_at_difference:.2f}"
            ),
            is_own=place == last,
        )
        for place, (name, a) in enumerate(results.items())
    ]


def length(followed: int, tokens: int) -> str:
    """A length in tokens; of one that was cut off at the end, that it is at least so many."""
    return f"{'at least ' if followed == tokens else ''}{followed:,}"


def what_was_tried(a: GreedyAgreement) -> str:
    """Numbers of prompts and tokens, and what the margins are beside."""
    return (
        f"{a.num_prompts:,} held-out prompts of {a.prompt_tokens:,} tokens, continued greedily by"
        f" {a.tokens:,}. Margin: how far the source's token lies above its second choice; over all"
        f" tokens {a.mean_margin:.2f} nats on average."
    )


def what_was_read(a: GreedyAgreement) -> str:
    parts = f"{a.num_parts:,} parts" if a.num_parts > 1 else "one part"
    return f"For the continuations the source was read {a.passes:,} times, in {parts}."


def print_agreements(results: Agreements, console: Console) -> None:
    """For a terminal; nothing where nothing was compared."""
    if not results:
        return
    table = Table(title="greedy agreement, tokens followed", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in agreement_rows(results):
        table.add_row(*row[:-1])
    console.print(table)
    *_, own = results.values()
    console.print(f"{what_was_tried(own)} {what_was_read(own)}", soft_wrap=True)


def greedy(results: Agreements, is_nvfp4: bool) -> dict[str, Any] | None:
    """Values of greedy.html.j2; None where nothing was compared. is_nvfp4: activations are
    emulated."""
    if not results:
        return None
    *_, own = results.values()
    return {
        "head": COLUMNS,
        "rows": agreement_rows(results),
        "tried": what_was_tried(own),
        "read": what_was_read(own),
        "is_nvfp4": is_nvfp4,
    }
