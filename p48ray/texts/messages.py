"""From a record's columns to messages and tools in the form that chat templates take.

Public data sets spell one thing in many ways. Read are: `role` and `content`, or ShareGPT's `from`
and `value`; contents that are texts, or lists of parts of which the texts are kept; `tool_calls`
and the older `function_call`; `reasoning_content`, `reasoning`, or reasoning that a rule finds in
the content; all of it as objects or as JSON in a text. Other keys of a message pass as they are;
what is null is absent.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from p48ray.config.documents import Reasoning
from p48ray.errors import RowSkippedError
from p48ray.texts.text_file import Columns, Row

SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Names of speakers, and the roles that chat templates know them by."""
MARKS: dict[Reasoning, tuple[str, str]] = {
    "openthoughts": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "think_tags": ("<think>", "</think>"),
}
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
"""What openthoughts puts around the rest."""
WRONG_TYPE = "of the wrong type"
NULL = "null where a text should be"
UNKNOWN_ROLE = "of an unknown role"
READ_HERE = frozenset(
    ("role", "from", "content", "value", "reasoning", "tool_calls", "function_call")
)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages and tools for a template, and what was left out of them. A message has a role, a
    content (null beside tool calls), and what else the record has."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    cut: set[str] = field(default_factory=set)


def read_chat(row: Row, name: str, columns: Columns, rule: Reasoning, template: str) -> Chat:
    """The chat of a record.

    Args:
        row: the record.
        name: its column that holds the chat.
        columns: names of the columns beside it.
        rule: how reasoning is marked in contents.
        template: text of the chat template; a role that it names is known.
    Raises: RowSkippedError naming key, expected and found.
    """
    turns = _objects(name, row.values[name])
    chat = Chat([], [_tool(tool) for tool in _tools(row, columns.tools)])
    system = row.values.get(columns.system)
    if isinstance(system, str) and system.strip() and turns and _speaker(turns[0]) != "system":
        chat.messages.append({"role": "system", "content": system})
    for i, turn in enumerate(turns):
        chat.messages.append(_message(f"{name}[{i}]", turn, rule, template, chat.cut))
    return chat


def _message(
    place: str, turn: Mapping[str, Any], rule: Reasoning, template: str, cut: set[str]
) -> dict[str, Any]:
    role = _role(place, turn, template)
    content = _content(place, turn, cut)
    calls = _calls(place, turn)
    if _speaker(turn) == "function_call" and not calls:  # ShareGPT: the call is the text
        calls, content = [_call(f"{place}.value", _parsed(f"{place}.value", content))], None
    message = {k: v for k, v in turn.items() if k not in READ_HERE and v is not None}
    reasoning = next(
        (r for k in ("reasoning_content", "reasoning") if isinstance(r := turn.get(k), str) and r),
        None,
    )
    if role == "assistant" and reasoning is None and content is not None:
        reasoning, content = _split(content, rule)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if content is None and not calls:
        if reasoning is None:
            raise RowSkippedError(
                NULL, f"{place}.{_content_key(turn)}: expected a text, found null"
            )
        content = ""
    if calls:
        message["tool_calls"] = calls
    return {"role": role, "content": content} | message


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _content_key(turn: Mapping[str, Any]) -> str:
    return "value" if "value" in turn and "content" not in turn else "content"


def _role(place: str, turn: Mapping[str, Any], template: str) -> str:
    speaker = _speaker(turn)
    key = f"{place}.{'from' if 'from' in turn and 'role' not in turn else 'role'}"
    if not isinstance(speaker, str):
        raise RowSkippedError(WRONG_TYPE, f"{key}: expected a text, found {kind_words(speaker)}")
    if speaker in SPEAKERS:
        return SPEAKERS[speaker]
    if f"'{speaker}'" in template or f'"{speaker}"' in template:
        return speaker
    known = ", ".join(sorted(SPEAKERS))
    raise RowSkippedError(
        UNKNOWN_ROLE,
        f"{key}: expected one of {known}, or a role that the chat template names, found"
        f" {speaker!r}",
    )


def _content(place: str, turn: Mapping[str, Any], cut: set[str]) -> str | None:
    """The text of a message; of a list of parts that of its texts, the others named in `cut`."""
    key = _content_key(turn)
    content = turn.get(key)
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) and "type" in content else content
    if not isinstance(parts, list) or not all(isinstance(p, str | dict) for p in parts):
        raise RowSkippedError(
            WRONG_TYPE,
            f"{place}.{key}: expected a text or a list of parts, found {kind_words(content)}",
        )
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            cut.add(f"{part.get('type') or 'nameless'} parts")
    return "".join(texts)


def _split(content: str, rule: Reasoning) -> tuple[str | None, str]:
    """(reasoning, rest) of an assistant's content by a rule; None where there is none."""
    if rule == "none":
        return None, content
    begin, end = MARKS[rule]
    before, found, rest = content.partition(end)
    # templates open the tag in the prompt, so that answers may lack it
    if not found or (begin not in before and rule == "openthoughts"):
        return None, content
    reasoning = before.partition(begin)[2] if begin in before else before
    if rule == "openthoughts" and SOLUTION[0] in rest:
        rest = rest.partition(SOLUTION[0])[2].partition(SOLUTION[1])[0]
    return reasoning.strip(), rest.strip()


def _calls(place: str, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    if turn.get("tool_calls"):
        key = f"{place}.tool_calls"
        return [_call(key, call) for call in _objects(key, turn["tool_calls"])]
    if turn.get("function_call"):
        key = f"{place}.function_call"
        return [_call(key, _parsed(key, turn["function_call"]))]
    return []


def _call(key: str, call: Any) -> dict[str, Any]:
    """{type, function: {name, arguments}} and what else there is, arguments read where they are
    JSON in a text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowSkippedError(
            WRONG_TYPE, f"{key}: expected a function with a name, found {kind_words(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # a model's own words, which may be cut
            arguments = json.loads(arguments or "{}")
    outer = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
    return {"type": "function"} | outer | {"function": function | {"arguments": arguments or {}}}


def _tools(row: Row, name: str) -> list[Mapping[str, Any]]:
    value = row.values.get(name)
    return _objects(name, value) if value not in (None, "", "null") else []


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """As servers pass it; some data sets have the function alone."""
    is_bare = "name" in tool and "function" not in tool and "type" not in tool
    return {"type": "function", "function": dict(tool)} if is_bare else dict(tool)


def _objects(key: str, value: Any) -> list[Mapping[str, Any]]:
    found = _parsed(key, value)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise RowSkippedError(
            WRONG_TYPE, f"'{key}': expected a list of objects, found {kind_words(found)}"
        )
    return found


def _parsed(key: str, value: Any) -> Any:
    """Data sets without nested types have chats and tools as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowSkippedError(
            WRONG_TYPE, f"'{key}': expected a list of objects, or it as JSON, found {value[:60]!r}"
        ) from None


def kind_words(value: Any) -> str:
    """A value's kind in messages, in the words of JSON."""
    words = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
    number = "a number" if isinstance(value, int | float) else type(value).__name__
    return "null" if value is None else words.get(type(value), number)
