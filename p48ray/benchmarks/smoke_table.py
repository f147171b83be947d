"""What a smoke test found, for a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from p48ray.benchmarks.completions import Answer, Scores, Unscored
from p48ray.benchmarks.smoke import Agreement, Smoke, is_garbage

WAYS = {"chat": "as chats", "plain": "as plain completions: no chat template for both"}


def print_smoke(found: Smoke, console: Console) -> None:
    """Answers side by side, then agreement, then what looks broken."""
    servers = [("server", found.server), ("reference", found.reference)]
    for title, asked in servers:
        if asked is not None:
            console.print(
                Text(f"{title:<10} {asked.model} at {asked.url}"), soft_wrap=True, highlight=False
            )
    table = Table(title=f"greedy answers, {WAYS[found.way]}", title_justify="left", show_lines=True)
    for title in ("", "prompt", *(title for title, asked in servers if asked is not None)):
        table.add_column(title, ratio=None if not title else 1, overflow="fold")
    for number, c in enumerate(found.compared, start=1):
        answers = [shown(c.server), *([shown(c.reference)] if c.reference is not None else [])]
        table.add_row(str(number), Text(c.prompt), *answers)
    console.print(table)
    for line in (*log_probability_lines(found), *flaw_lines(found)):
        console.print(Text(line), soft_wrap=True, highlight=False)


def shown(answer: Answer) -> Text:
    """An answer without what a terminal would act on."""
    text = answer.flaw or answer.text.strip()
    return Text("".join("\ufffd" if is_garbage(c) or c == "\r" else c for c in text))


def log_probability_lines(found: Smoke) -> list[str]:
    """How far both are apart; without a reference, how likely the server finds its own answers."""
    silent = {
        who: scores.reason
        for c in found.compared
        for who, scores in zip(("server", "reference"), c.scores, strict=True)
        if isinstance(scores, Unscored)
    }
    lines = [f"log-probabilities: the {who} gives none: {why}" for who, why in silent.items()]
    if found.agreement is not None:
        return [*lines, agreement_line(found.agreement)]
    if found.reference is not None:
        return lines or ["log-probabilities: none to compare, no text has the same tokens"]
    own = [c.scores[0] for c in found.compared]
    means = [s.mean for s in own if isinstance(s, Scores) and s.is_finite]
    if means:
        mean = sum(means) / len(means)
        lines.append(f"log-probabilities: {mean:.3f} nats a token, prompts and own answers")
    return lines


def agreement_line(a: Agreement) -> str:
    first = "" if a.same_first is None else f"; the same first choice at {a.same_first:.1%}"
    return (
        f"log-probabilities: {a.apart:.4f} nats a token apart (the server's lower by"
        f" {a.lower:.4f}) over {a.num_tokens:,} tokens of {a.num_texts} texts{first}"
    )


def flaw_lines(found: Smoke) -> list[str]:
    """Every prompt with something that looks broken, and how many there are."""
    count = len(found.compared)
    if not found.num_flawed:
        return [f"nothing looks broken in {count} prompts"]
    lines = [
        f"  {number:>2}  {'; '.join(c.flaws)}"
        for number, c in enumerate(found.compared, start=1)
        if c.flaws
    ]
    return [f"{found.num_flawed} of {count} prompts look broken:", *lines]
