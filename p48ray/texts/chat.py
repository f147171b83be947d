"""From a record to its document: the text itself, or a chat in the words of the tokenizer's own
template."""

from collections.abc import Mapping
from typing import Any

from p48ray.errors import CalibrationError
from p48ray.texts.text_file import COLUMNS, Row

CHAT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Names of speakers in `conversations`, and the roles that chat templates know."""


def document_text(row: Row, tokenizer: Any) -> str:
    """The document of one record, without the bos that packing puts before each.

    Raises: CalibrationError naming the place of the record and the column.
    """
    column = next(name for name in COLUMNS if name in row.values)
    value = row.values[column]
    if column == "text":
        text = value
        if not isinstance(text, str):
            raise CalibrationError(
                f"{row.where}: 'text' should be a string, found {type(text).__name__}"
            )
    else:
        messages = _messages(row, value) if column == "messages" else _turns(row, value)
        text = _rendered(row, column, messages, tokenizer)
    try:
        # JSON can spell half a surrogate pair (\ud83d alone), which is no text and stops tokenizers
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start}"
        raise CalibrationError(
            f"{row.where}: expected a {column!r} that is Unicode, found {found}"
        ) from None
    return text


def _messages(row: Row, value: Any) -> list[dict[str, Any]]:
    """[{role, content}, ...], content a string or parts with a text each."""
    turns = _list_of_objects(row, "messages", value)
    return [
        {"role": _string(row, f"messages[{i}].role", t.get("role")), "content": _content(row, i, t)}
        for i, t in enumerate(turns)
    ]


def _content(row: Row, number: int, turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return _string(row, f"messages[{number}].content", content)


def _turns(row: Row, value: Any) -> list[dict[str, Any]]:
    """[{from, value}, ...], with the record's `system` text before them where it has one."""
    messages: list[dict[str, Any]] = []
    if isinstance(system := row.values.get("system"), str) and system.strip():
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(_list_of_objects(row, "conversations", value)):
        speaker = _string(row, f"conversations[{i}].from", turn.get("from"))
        if speaker not in CHAT_ROLES:
            known = ", ".join(sorted(CHAT_ROLES))
            raise CalibrationError(
                f"{row.where}: conversations[{i}].from: expected one of {known}, found {speaker!r}"
            )
        messages.append(
            {
                "role": CHAT_ROLES[speaker],
                "content": _string(row, f"conversations[{i}].value", turn.get("value")),
            }
        )
    return messages


def _list_of_objects(row: Row, column: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise CalibrationError(
            f"{row.where}: {column!r} should be a list of objects, found {type(value).__name__}"
        )
    return value


def _string(row: Row, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CalibrationError(
            f"{row.where}: {name} should be a string, found {type(value).__name__}"
        )
    return value


def _rendered(row: Row, column: str, messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """Through the chat template; nothing for a chat without turns."""
    if not messages:
        return ""
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{row.where}: {column!r} holds a chat, and the source's tokenizer has no chat"
            " template; use a 'text' column"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        raise CalibrationError(
            f"{row.where}: {column!r}: the tokenizer's chat template refuses it:"
            f" {type(error).__name__}: {error}"
        ) from error
    bos = getattr(tokenizer, "bos_token", None)
    return str(text).removeprefix(bos) if bos else str(text)
