"""Text of others in the model card: names of files, devices, benchmarks and licences stay text.

The Hub's Markdown has tables and HTML. Whatever could end a cell, open a tag or begin emphasis is
written as a numbered entity, which every place but a code span reads.
"""

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"[&<>|\\`*\[\]~#!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""An underscore inside a word begins nothing."""

PLAIN_CODE = re.compile(r"[\w./:@+=,-]+( [\w./:@+=,-]+)*")


def plain(text: str) -> str:
    """One line that reads as the text, in a paragraph or a cell."""
    return SPECIAL.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def code(text: str) -> str:
    """The same in the type of code. In a code span entities are not read: one is used only for text
    that needs none."""
    return f"`{text}`" if PLAIN_CODE.fullmatch(text) else f"<code>{plain(text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """A block of code, whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown: others' text in them has gone through `plain` or `code`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
