"""A source of texts in a mix: where it lies, how much of the mix it is, and how it is read."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from p48ray.config.addresses import EndpointUrl, Place
from p48ray.config.section import Section, as_tuple

ColumnKind = Literal["messages", "text", "tools", "system"]
Reasoning = Literal["openthoughts", "think_tags", "none"]
OUR_ARGUMENTS = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)
"""Of apply_chat_template: what a source can not set, because texts depend on it otherwise."""


def as_template_arguments(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """What the chat template itself knows."""
    if ours := [name for name in OUR_ARGUMENTS if name in arguments]:
        raise ValueError(f"expected arguments of the template itself, not {', '.join(ours)}")
    return arguments


DOMAIN_NAME = re.compile(r"\w([\w +./-]{0,38}[\w+])?")


def as_domain_name(name: str) -> str:
    """A short label, which stands in tables."""
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError(
            "expected 1 to 40 letters and digits, with spaces, _ + . / or - between them"
        )
    return name


class DocumentSource(Section):
    """One source of texts in a mix: JSON or Parquet with a column text, messages or
    conversations. docs/sources-and-texts.md says how they are read."""

    path: Place = Field(
        min_length=1,
        description=(
            "File or folder, local or s3://, or hf://datasets/owner/name[@revision][/path]."
        ),
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=10**6,
        description="[relative] Share of the sequences, as a proportion of the sum of all weights.",
    )
    name: Annotated[str, AfterValidator(as_domain_name)] | None = Field(
        None,
        description=(
            "Domain of the texts (prose, code, chat): the evaluation has figures of each. Sources"
            " of one name are one domain; null: other, in a mix where some have names. Calibration"
            " is the same with and without."
        ),
    )
    endpoint_url: EndpointUrl = Field(
        None,
        description="URL of the S3-compatible store that holds it; null: as the environment says.",
    )
    split: str | None = Field(
        None,
        pattern=r"^\w+$",
        description=(
            "Of a folder, only files that have this word in their name or folder (train); null:"
            " all."
        ),
    )
    columns: dict[ColumnKind, Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        description=(
            "Which column of a record is read, by what it holds: `{messages: chat}` or `{text:"
            " body}`, and tools and system beside a chat. null: messages, conversations, text, the"
            " first that is filled; tools and system by these names."
        ),
    )
    reasoning: Reasoning = Field(
        "none",
        description=(
            "How the reasoning in an assistant's content is marked, which the template then gets"
            " apart from it: openthoughts (`<|begin_of_thought|>`), think_tags (`<think>`), or"
            " none: it stays where it is."
        ),
    )
    template_arguments: Annotated[dict[str, JsonValue], AfterValidator(as_template_arguments)] = (
        Field(
            {},
            description=(
                "Passed to the tokenizer's chat template by name, for instance what makes it keep"
                " the reasoning of past turns."
            ),
        )
    )
    max_skipped_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description=(
            "[rows] Share of the rows read that may be of no use (null, of another type, refused by"
            " the template; empty ones do not count). Above it the run stops and names the first."
        ),
    )


def as_mix(value: object) -> object:
    """A single path means a mix of one."""
    return ({"path": value},) if isinstance(value, str) else as_tuple(value)


Documents = Annotated[tuple[DocumentSource, ...], BeforeValidator(as_mix), Field(min_length=1)]
