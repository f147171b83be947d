"""The reasoning of a chat's last answer, where the template has left it out.

While the served model answers, its reasoning is in its context. Kimi-K2.5's template knows no chat
that ends with an answer: it takes the last answer for history, and of history it writes an empty
think block; DeepSeek's from V3.2 on write the end of one. Without this a chat for calibration would
hold none of the reasoning that the model is to write.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

ANSWER_MARKS = ("\ue000", "\ue001")  # of private use: no text has them
EMPTY_BLOCK = r"(?:<think>(\s*))?</think>(\s*)"


def with_answer_reasoning(
    text: str,
    messages: Sequence[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], str],
) -> str:
    """A rendered chat whose last answer, and the calls that led to it, have their reasoning in the
    think blocks that the template has left empty.

    Args:
        text: as the template renders the messages.
        messages: of the chat, with `reasoning_content` where there is any.
        render: messages -> text, the template.
    Returns: the text as it is where the template leaves no empty block in front of an answer that
        has reasoning, or treats an answer by what it says.
    """
    asked = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)
    missing = {
        n: reasoning
        for n, m in enumerate(messages)
        if n > asked
        and m["role"] == "assistant"
        and (reasoning := str(m.get("reasoning_content") or "").strip())
    }
    if not missing or "</think>" not in text or any(mark in text for mark in ANSWER_MARKS):
        return text
    marks = {n: f"{ANSWER_MARKS[0]}{n}{ANSWER_MARKS[1]}" for n in missing}
    try:
        marked = render(
            [
                m | {"content": f"{marks[n]}{m.get('content') or ''}"} if n in marks else m
                for n, m in enumerate(messages)
            ]
        )
    except Exception:  # noqa: BLE001  a template may refuse a call with a content beside it
        return text
    if re.sub(f"{ANSWER_MARKS[0]}\\d+{ANSWER_MARKS[1]}", "", marked) != text:
        return text
    for n, reasoning in missing.items():

        def filled(block: re.Match[str], reasoning: str = reasoning) -> str:
            inside, after = block.groups()
            before = block.string[: block.start()]
            if inside is None and before.rfind("<think>") > before.rfind("</think>"):
                return block.group()  # a block that is not empty: reasoning in other words
            line = "\n" * ("\n" in (inside or ""))
            return f"<think>{line}{reasoning}{line}</think>{after}"

        marked = re.sub(EMPTY_BLOCK + marks[n], filled, marked)
    return re.sub(f"{ANSWER_MARKS[0]}\\d+{ANSWER_MARKS[1]}", "", marked)
