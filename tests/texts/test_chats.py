"""Chats as the served model sees them, in the templates of several families, held against what
transformers itself makes of the same messages."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError
from transformers import AutoTokenizer

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, ConfigError
from p48ray.store import LocalStore
from p48ray.texts import documents
from p48ray.texts.documents import read_documents
from p48ray.texts.parquet_rows import opened_parquet
from p48ray.texts.tally import Tally
from p48ray.texts.text_file import Columns, TextFile
from tests.conftest import TINY
from tests.texts.packed import packed
from tests.texts.templates import CALLS_WITHOUT_CONTENT, TEMPLATES

KEY = "calibration.documents"
WRITERS = Path(__file__).parent / "writers"


@pytest.fixture(scope="module")
def small() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


class AsksForAnswers:
    """A tokenizer as Kimi's: its own code asks for an answer unless it is told not to."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.chat_template = tokenizer, tokenizer.chat_template
        self.bos_token = tokenizer.bos_token

    def apply_chat_template(
        self, conversation: Any, add_generation_prompt: bool = True, **rest: Any
    ) -> str:
        return str(
            self.inner.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, **rest
            )
        )


@pytest.fixture(params=TEMPLATES)
def family(request: pytest.FixtureRequest, small: Any) -> Any:
    return with_template(small, request.param)


def with_template(small: Any, name: str) -> Any:
    found = deepcopy(small)
    found.chat_template = TEMPLATES[name]
    return AsksForAnswers(found) if name == "kimi" else found


def own(tokenizer: Any, messages: list[dict[str, Any]], **extra: Any) -> str:
    """transformers' rendering, as a server asks for it, without the bos."""
    text = str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, **extra
        )
    )
    return text.removeprefix(tokenizer.bos_token)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: Any, tally: Tally | None = None, **settings: Any) -> list[str]:
    """The documents of a file, any share of which may be skipped."""
    found = DocumentSource(path=str(path), **({"max_skipped_share": 1.0} | settings))
    return list(read_documents(found, KEY, 0, tokenizer, tally))


USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is 4."}
SECOND = {"role": "user", "content": "And 3 + 3?"}


def test_chat_is_what_transformers_renders_without_a_prompt_for_an_answer(
    family: Any, tmp_path: Path
) -> None:
    messages = [SYSTEM, USER, ANSWER, SECOND, {"role": "assistant", "content": "6."}]
    (text,) = read(lines(tmp_path / "a.jsonl", {"messages": messages}), family)
    assert text == own(family, messages)
    assert all(m["content"] in text for m in messages)
    asked = family.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(text) < len(asked.removeprefix(family.bos_token)), "the form has such a prompt"


MARKED = {
    "openthoughts": "<|begin_of_thought|>\n\nTwo twos.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|>",
    "think_tags": "<think>\nTwo twos.\n</think>\n\nIt is 4.",
    "explicit": "It is 4.",
}
REASONED = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two twos."}


@pytest.mark.parametrize("kind", MARKED)
def test_reasoning_reaches_the_template_apart_from_the_answer(
    family: Any, tmp_path: Path, kind: str
) -> None:
    turn = {"role": "assistant", "content": MARKED[kind]}
    rule = kind
    if kind == "explicit":
        turn, rule = turn | {"reasoning": "Two twos."}, "none"
    tally = Tally()
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, turn]})
    (text,) = read(path, family, tally, reasoning=rule)
    rendered = own(family, [USER, REASONED])
    if family.chat_template == TEMPLATES["deepseek"]:  # it has the end of a block only
        rendered = rendered.replace("</think>", "<think>Two twos.</think>")
    assert text == rendered and "Two twos." in text
    assert not tally.cut


def test_without_a_rule_the_content_stays_as_it_is(family: Any, tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": MARKED["openthoughts"]}
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, turn]})
    assert read(path, family) == [own(family, [USER, turn])]
    assert "<|begin_of_thought|>" in read(path, family)[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no marks", {"content": "no marks"}),
        ("<think>cut short", {"content": "<think>cut short"}),
        ("opened by the prompt</think>so", {"reasoning_content": "opened by the prompt"}),
    ],
)
def test_marks_that_are_not_all_there(
    small: Any, tmp_path: Path, content: str, expected: dict[str, str]
) -> None:
    tokenizer = with_template(small, "kimi")
    path = lines(
        tmp_path / "a.jsonl", {"messages": [USER, {"role": "assistant", "content": content}]}
    )
    turn = {"role": "assistant", "content": "so"} | expected
    assert read(path, tokenizer, reasoning="think_tags") == [own(tokenizer, [USER, turn])]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("kimi", {"preserve_thinking": True}), ("glm", {"clear_thinking": False})],
)
def test_past_reasoning_is_kept_where_the_template_is_told_to(
    small: Any, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    tokenizer = with_template(small, name)
    messages = [USER, REASONED, SECOND, {"role": "assistant", "content": "6."}]
    path = lines(tmp_path / "a.jsonl", {"messages": messages})
    tally, dropped = Tally(), Tally()
    (kept,) = read(path, tokenizer, tally, template_arguments=arguments)
    (without,) = read(path, tokenizer, dropped)
    assert kept == own(tokenizer, messages, **arguments) and "Two twos." in kept
    assert "Two twos." not in without
    assert (dict(tally.cut), dict(dropped.cut)) == ({}, {"reasoning left out by the template": 1})


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ARGUMENTS = {"city": "Zürich", "days": 2}


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "functions.weather:0",
                "type": "function",
                "function": {"name": "weather", "arguments": arguments},
            }
        ],
    }


RESULT = {"role": "tool", "tool_call_id": "functions.weather:0", "content": "7 degrees"}
SPELT = json.dumps(ARGUMENTS, ensure_ascii=False)
TRACES: dict[str, dict[str, Any]] = {
    "arguments as text": {"messages": [USER, call(SPELT), RESULT, ANSWER], "tools": [TOOL]},
    "arguments as objects": {"messages": [USER, call(ARGUMENTS), RESULT, ANSWER], "tools": [TOOL]},
    "all of it as text": {
        "messages": json.dumps([USER, call(SPELT), RESULT, ANSWER]),
        "tools": json.dumps([TOOL]),
    },
    "a function alone": {
        "messages": [USER, call(SPELT), RESULT, ANSWER],
        "tools": [TOOL["function"]],
    },
}


@pytest.mark.parametrize("trace", TRACES)
def test_tools_and_calls_reach_the_template_in_the_form_that_it_takes(
    family: Any, tmp_path: Path, trace: str
) -> None:
    tally = Tally()
    (text,) = read(lines(tmp_path / "a.jsonl", TRACES[trace]), family, tally)
    takes_text = family.chat_template == TEMPLATES["deepseek"]
    messages = [USER, call(SPELT if takes_text else ARGUMENTS), RESULT, ANSWER]
    assert text == own(family, messages, tools=[TOOL])
    assert "Zürich" in text and "7 degrees" in text and "None" not in text
    assert dict(tally.cut) == ({"tools left out by the template": 1} if takes_text else {})


def test_calls_of_older_forms_are_tool_calls(family: Any, tmp_path: Path) -> None:
    function = {"name": "weather", "arguments": SPELT}
    old = {"role": "assistant", "content": None, "function_call": function}
    shares = [
        {"from": "human", "value": USER["content"]},
        {"from": "function_call", "value": json.dumps(function)},
        {"from": "observation", "value": "7 degrees"},
    ]
    path = lines(
        tmp_path / "a.jsonl",
        {"messages": [USER, old, {"role": "function", "content": "7"}]},
        {"conversations": shares},
    )
    texts = read(path, family)
    assert len(texts) == 2 and all("Zürich" in text for text in texts)
    assert ("weather" in texts[1]) == (family.chat_template != TEMPLATES["kimi"])


def test_calls_that_the_template_leaves_out_are_counted(small: Any, tmp_path: Path) -> None:
    """transformers gives templates an empty text for a null content: a template that knows calls by
    the null drops them, on a server too."""
    tokenizer, tally = deepcopy(small), Tally()
    tokenizer.chat_template = CALLS_WITHOUT_CONTENT
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, call(SPELT), RESULT, ANSWER]})
    assert read(path, tokenizer, tally) == [own(tokenizer, [USER, call(SPELT), RESULT, ANSWER])]
    assert dict(tally.cut) == {"tool calls left out by the template": 1}


def test_text_parts_are_kept_and_others_named_and_counted(family: Any, tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "What is "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_text", "text": "2 + "},
        {"type": "image_url", "image_url": {"url": "y"}},
        {"audio": "z"},
        "2?",
    ]
    tally = Tally()
    path = lines(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": parts}, ANSWER]},
        {"messages": [USER, ANSWER]},
    )
    assert read(path, family, tally) == [own(family, [USER, ANSWER])] * 2
    assert dict(tally.cut) == {"image_url parts": 1, "nameless parts": 1}
    assert (tally.rows, tally.documents, dict(tally.skipped)) == (2, 2, {})


def test_role_that_the_template_drops_is_counted(small: Any, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"messages": [{"role": "developer", "content": "Dev."}, USER, ANSWER]}
    )
    counts = {}
    for name in TEMPLATES:
        tally = Tally()
        texts = read(path, with_template(small, name), tally)
        counts[name] = ([("Dev." in t) for t in texts], dict(tally.cut), dict(tally.skipped))
    lost = {"developer content left out by the template": 1}
    assert counts == {
        "kimi": ([True], {}, {}),
        "qwen3": ([False], lost, {}),
        "deepseek": ([], {}, {"refused by the chat template": 1}),
        "glm": ([False], lost, {}),
    }


def test_role_that_only_the_template_names_is_taken(small: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, {"role": "critic", "content": "Hm."}]})
    assert "Hm." in read(path, with_template(small, "glm"))[0]
    tally = Tally()
    assert read(path, with_template(small, "kimi"), tally) == []
    assert dict(tally.skipped) == {"of an unknown role": 1}


MESSY: list[Any] = [
    {"text": None},
    {"text": "  "},
    {"messages": [], "text": ""},
    {"messages": None, "text": None, "other": 1},
    {"other": 1},
    {"messages": [{"role": "ghost", "content": "u"}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": None}]},
    {"text": "\ud83d"},
    {"messages": 3},
    {"text": {"a": 1}},
]


def test_rows_of_no_use_are_counted_by_reason(small: Any, tmp_path: Path) -> None:
    tally = Tally()
    path = lines(tmp_path / "a.jsonl", *MESSY, *[{"messages": [USER, ANSWER]}] * 9)
    texts = read(path, with_template(small, "qwen3"), tally)
    assert len(texts) == tally.documents == 9 and tally.rows == 20
    assert tally.characters == sum(map(len, texts))
    assert dict(tally.skipped) == {
        "null where a text should be": 3,
        "empty": 2,
        "without such a column": 1,
        "of an unknown role": 1,
        "of the wrong type": 3,
        "not Unicode": 1,
    }


@pytest.mark.parametrize(("num_bad", "is_fatal"), [(1, False), (2, True)])
def test_share_decides_and_the_first_row_of_the_most_frequent_reason_is_named(
    small: Any, tmp_path: Path, num_bad: int, is_fatal: bool
) -> None:
    """20 empty rows among them say nothing."""
    good, empty = {"text": "fine"}, {"text": ""}
    path = lines(tmp_path / "a.jsonl", *[good] * 9, *[empty] * 30, *[{"text": None}] * num_bad)
    settings = {"max_skipped_share": 1 / 40}
    if not is_fatal:
        assert read(path, small, **settings) == ["fine"] * 9
        return
    with pytest.raises(
        CalibrationError,
        match=(
            r"^calibration\.documents: .*a\.jsonl, line 40: 'text': expected a text or a chat,"
            r" found null \(the first of 2 skipped of 41 rows read of .*a\.jsonl: 30 empty, 2 null"
            r" where a text should be; max_skipped_share: 0\.025\)$"
        ),
    ):
        read(path, small, **settings)


def test_columns_are_those_that_are_named(small: Any, tmp_path: Path) -> None:
    tokenizer = with_template(small, "glm")
    path = lines(
        tmp_path / "a.jsonl",
        {
            "chat": [USER, ANSWER],
            "body": "prose",
            "text": "other",
            "functions": [TOOL],
            "prompt": "Be brief.",
        },
    )
    assert read(path, tokenizer) == ["other"]
    assert read(path, tokenizer, columns={"text": "body"}) == ["prose"]
    assert read(path, tokenizer, columns={"messages": "chat"}) == [own(tokenizer, [USER, ANSWER])]
    found = read(
        path,
        tokenizer,
        columns={"messages": "chat", "tools": "functions", "system": "prompt"},
    )
    assert found == [own(tokenizer, [SYSTEM, USER, ANSWER], tools=[TOOL])]
    with pytest.raises(CalibrationError, match=r"expected a column 'none', found chat, body"):
        read(path, tokenizer, columns={"text": "none"}, max_skipped_share=0.0)


# What writers make.

HI = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
]


def as_json(values: list[Any]) -> pyarrow.Array:
    texts = [None if v is None else json.dumps(v) for v in values]
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts))


def json_contents() -> pyarrow.Array:
    roles = pyarrow.array([m["role"] for m in HI])
    struct = pyarrow.StructArray.from_arrays(
        [roles, as_json([m["content"] for m in HI])], ["role", "content"]
    )
    return pyarrow.ListArray.from_arrays([0, 2], struct)


JSON_PLACES: dict[str, Callable[[], pyarrow.Array]] = {
    "the column": lambda: as_json([HI]),
    "a message": lambda: pyarrow.ListArray.from_arrays([0, 2], as_json(HI)),
    "a content": json_contents,
}


@pytest.mark.parametrize("place", JSON_PLACES)
@pytest.mark.parametrize("with_schema", [True, False])
def test_arrows_json_is_read_wherever_it_stands(
    small: Any, tmp_path: Path, place: str, with_schema: bool
) -> None:
    tokenizer = with_template(small, "qwen3")
    parquet.write_table(
        pyarrow.table({"messages": JSON_PLACES[place]()}),
        tmp_path / "a.parquet",
        store_schema=with_schema,
    )
    assert read(tmp_path / "a.parquet", tokenizer) == [
        own(tokenizer, [HI[0], {"role": "assistant", "content": "Hi."}])
    ]


def test_arrows_json_in_lists_is_held_once_however_often_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": JSON_PLACES["a message"]()}), path)
    file = TextFile(LocalStore(tmp_path), path.name, path.stat().st_size, str(path))
    with opened_parquet(file, KEY, Columns(), ["messages.list.element"]) as opened:
        kind = opened.read_row_group(0).column("messages").type.value_type
    assert pyarrow.types.is_dictionary(kind)


def test_json_of_arrow_that_is_none_is_refused_by_row(small: Any, tmp_path: Path) -> None:
    array = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(["[1", "[]"]))
    parquet.write_table(pyarrow.table({"messages": array}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a\.parquet, row 1: 'messages' is not JSON"):
        read(tmp_path / "a.parquet", small)


def weather(name: str, arguments: Any, number: int, result: str, question: str) -> list[Any]:
    function = {"name": name, "arguments": arguments}
    made = {"id": f"c{number}", "type": "function", "function": function}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": f"c{number}", "content": result},
    ]


MIXED = [
    [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}],
    weather("weather", {"city": "Paris"}, 0, "7", "Weather?"),
    weather("add", {"a": 1, "b": [2]}, 1, "3", "Add."),
]
"""Contents that are texts, null and parts, and calls whose arguments have other keys."""
PLAIN = [
    [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}],
    weather("end", {}, 0, "", "Bye.")[:2],
]


@pytest.mark.parametrize("name", sorted(p.name for p in WRITERS.iterdir()))
def test_files_of_other_writers_are_read_as_what_was_written(small: Any, name: str) -> None:
    tokenizer, tally = with_template(small, "qwen3"), Tally()
    chats = MIXED if "mixed" in name else PLAIN
    assert read(WRITERS / name, tokenizer, tally) == [own(tokenizer, chat) for chat in chats]
    assert dict(tally.cut) == ({"image_url parts": 1} if "mixed" in name else {})
    assert not tally.skipped


def test_structs_of_pyarrow_have_no_arguments_that_are_null(small: Any, tmp_path: Path) -> None:
    tokenizer = with_template(small, "qwen3")
    rows = [{"messages": chat, "tools": [TOOL]} for chat in MIXED]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [own(tokenizer, chat, tools=[TOOL]) for chat in MIXED]
    found = read(tmp_path / "a.parquet", tokenizer)
    assert found == read(lines(tmp_path / "a.jsonl", *rows), tokenizer) == expected
    assert "null" not in found[1]


# Packing.


class Words:
    """A tokenizer of words, with a bos, an eos, both or none."""

    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos_token_id, self.eos_token_id, self.eos_token = bos, eos, "</s>"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(w) for w in text.replace("</s>", " </s>").split()]}


@pytest.mark.parametrize(
    ("bos", "eos", "texts", "expected"),
    [
        (8, 9, ["a bb", "ccc"], [8, 1, 2, 8, 3]),
        (8, None, ["a bb", "ccc"], [8, 1, 2, 8, 3]),
        (None, 9, ["a bb", "ccc"], [1, 2, 9, 3]),
        (None, 9, ["a bb</s>\n", "ccc", "d"], [1, 2, 4, 3, 9, 1]),
        (None, None, ["a bb", "ccc"], [1, 2, 3]),
    ],
)
def test_documents_are_kept_apart_by_bos_or_else_by_eos(
    bos: int | None, eos: int | None, texts: list[str], expected: list[int]
) -> None:
    tally = Tally()
    rows = packed(texts, Words(bos, eos), len(expected), tally=tally)
    assert rows.tolist() == [expected] and tally.tokens == len(expected)


# What is counted of a source that is sampled, and which of its files are read.


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_a_sampled_source_are_counted_once_though_visits_read_them_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    rows = [{"text": None if i % 10 == 3 else f"{i}" * 30} for i in range(60)]
    rows[7] = {"text": "x" * 500}
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        lines(path, *rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "VISIT_CHARACTERS", 100)
    tally = Tally()
    texts = read(path, small, tally)
    assert (tally.rows, tally.documents, len(texts)) == (60, 54, 54)
    assert dict(tally.skipped) == {"null where a text should be": 6}
    assert dict(tally.cut) == {"longer than 100 characters": 1}
    assert tally.characters == sum(map(len, texts)) and max(map(len, texts)) == 100


def test_sampled_source_of_nothing_usable_is_not_read_to_its_end(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "ENOUGH_ROWS", 20)
    tally = Tally()
    path = lines(tmp_path / "a.jsonl", *[{"text": None}] * 1000)
    with pytest.raises(CalibrationError, match=r"line 1: .*the first of 20 skipped of 20 rows"):
        read(path, small, tally, max_skipped_share=0.5)
    assert tally.rows == 20


def test_split_takes_files_with_its_word_in_name_or_folder(small: Any, tmp_path: Path) -> None:
    names = (
        "train-00000-of-00001.jsonl",
        "data/train.jsonl",
        "train/0.jsonl",
        "test.jsonl",
        "constrained.jsonl",
        "trainer/a.jsonl",
    )
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / "d" / name, {"text": name})
    assert sorted(read(tmp_path / "d", small, split="train")) == sorted(names[:3])
    assert read(tmp_path / "d", small, split="test") == ["test.jsonl"]
    with pytest.raises(ConfigError, match=r"split: expected files with 'valid' in their name"):
        read(tmp_path / "d", small, split="valid")
    with pytest.raises(ConfigError, match="split: expected a folder, of whose files 'test' takes"):
        read(tmp_path / "d" / "test.jsonl", small, split="test")


def test_arguments_that_are_not_the_templates_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="of the template itself, not add_generation_prompt"):
        DocumentSource(path="a", template_arguments={"add_generation_prompt": True})
