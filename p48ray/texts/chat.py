"""From a record to its document: the text itself, or a chat in the words of the tokenizer's own
template, without a prompt for an answer that is not there."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, RowSkippedError
from p48ray.texts.messages import NULL, WRONG_TYPE, Chat, kind_words, read_chat
from p48ray.texts.reasoning import with_answer_reasoning
from p48ray.texts.tally import EMPTY_ROW
from p48ray.texts.text_file import Columns, Row

REFUSED = "refused by the chat template"
NOT_UNICODE = "not Unicode"
TOKENIZER_CODE = threading.RLock()
"""Held while a tokenizer's own Python runs, which may be code of the checkpoint that was never
meant for threads. Sources of texts are read in several."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, without the bos that packing puts before it, and what its record has lost."""

    text: str
    cut: set[str] = field(default_factory=set)


def document_of(row: Row, source: DocumentSource, tokenizer: Any) -> Document:
    """The document of one record.

    Raises: RowSkippedError naming column, expected and found; CalibrationError naming the record's
        place where no chat of this source can be read: the tokenizer has no template.
    """
    columns = Columns.of(source)
    name = next((n for n in columns.documents if row.values.get(n)), None)
    if name is None:
        raise _nothing_in(row, columns)
    if name in columns.texts:
        text = row.values[name]
        if not isinstance(text, str):
            raise RowSkippedError(
                WRONG_TYPE, f"{name!r}: expected a text, found {kind_words(text)}"
            )
        document = Document(text)
    else:
        template = _template(tokenizer)
        if template is None:
            raise CalibrationError(
                f"{row.where}: {name!r} holds a chat, and the source's tokenizer has no chat"
                " template; name a column of texts (columns: {text: NAME})"
            )
        chat = read_chat(row, name, columns, source.reasoning, template)
        document = _rendered(name, chat, source, tokenizer)
    try:
        # JSON can spell half a surrogate pair (\ud83d alone), which is no text and stops tokenizers
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start}"
        raise RowSkippedError(
            NOT_UNICODE, f"expected a {name!r} that is Unicode, found {found}"
        ) from None
    if not document.text.strip():
        raise RowSkippedError(EMPTY_ROW, f"{name!r}: expected a text, found white space")
    return document


def _nothing_in(row: Row, columns: Columns) -> RowSkippedError:
    """Why no column of a record has a document."""
    held = {n: row.values[n] for n in columns.documents if n in row.values}
    if not held:
        found = ", ".join(row.values) or "none"
        return RowSkippedError(
            "without such a column", f"expected a column {columns}, found {found}"
        )
    name = next((n for n in held if held[n] is not None), next(iter(held)))
    value = held[name]
    if value is None:
        return RowSkippedError(NULL, f"{name!r}: expected a text or a chat, found null")
    if isinstance(value, str | list):
        return RowSkippedError(
            EMPTY_ROW, f"{name!r}: expected a text or a chat, found an empty one"
        )
    return RowSkippedError(
        WRONG_TYPE, f"{name!r}: expected a text or a chat, found {kind_words(value)}"
    )


def _template(tokenizer: Any) -> str | None:
    """Its text (of several all, one after the other); None where there is none."""
    found = getattr(tokenizer, "chat_template", None)
    return "\n".join(map(str, found.values())) if isinstance(found, dict) else found


def _rendered(name: str, chat: Chat, source: DocumentSource, tokenizer: Any) -> Document:
    """Through the chat template."""
    extra: dict[str, Any] = dict(source.template_arguments)
    if chat.tools:
        extra["tools"] = chat.tools
    reason: Exception | None = None

    def render(messages: list[dict[str, Any]]) -> str:
        # templates and tokenizers that are code differ in the default: Kimi's ask for an answer
        with TOKENIZER_CODE:
            return str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=False, **extra
                )
            )

    for messages in _spellings(chat.messages):
        try:
            text = with_answer_reasoning(render(messages), messages, render)
            break
        except Exception as error:  # noqa: BLE001  templates and their code raise anything
            reason = reason or error
    else:
        raise RowSkippedError(
            REFUSED,
            f"{name!r}: expected a chat that the tokenizer's chat template takes, found"
            f" {type(reason).__name__}: {reason}",
        )
    bos = getattr(tokenizer, "bos_token", None)
    text = text.removeprefix(bos) if bos else text
    return Document(text, chat.cut | _left_out(chat, text, _template(tokenizer) or ""))


def _spellings(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages as templates may want them: arguments of calls as objects, as servers pass
    them (GLM's template takes nothing else), or as JSON in a text (as DeepSeek's does)."""
    yield messages
    if any("tool_calls" in m for m in messages):
        yield [_with_text_arguments(m) for m in messages]


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message

    def spelt(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        is_text = isinstance(arguments, str)
        text = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": function | {"arguments": text}}

    return message | {"tool_calls": [spelt(call) for call in message["tool_calls"]]}


def _left_out(chat: Chat, text: str, template: str) -> set[str]:
    """What the template has not put into the text: some drop the reasoning of past turns, or roles
    that they do not know."""

    def is_there(part: str) -> bool:
        return part.strip() in text or json.dumps(part, ensure_ascii=False)[1:-1] in text

    lost = set()
    for message in chat.messages:
        if not is_there(message["content"] or ""):
            lost.add(f"{message['role']} content")
        if not is_there(message.get("reasoning_content", "")):
            lost.add("reasoning")
        calls = message.get("tool_calls", ())
        if not all(is_there(call["function"]["name"]) for call in calls):
            lost.add("tool calls")
    names = [str(tool.get("function", tool).get("name", "")) for tool in chat.tools]
    # a name may stand in a call
    if names and not ("tools" in template and all(map(is_there, names))):
        lost.add("tools")
    return {f"{what} left out by the template" for what in lost}
