"""Reasoning that a template takes from a chat's last answer is put back, and nothing else."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from p48ray.texts.reasoning import ANSWER_MARKS, with_answer_reasoning
from p48ray.texts.tally import Tally
from tests.texts.templates import KIMI_THINKING, TEMPLATES
from tests.texts.test_chats import AsksForAnswers, lines, read, small

__all__ = ["small"]

USER = {"role": "user", "content": "What is 2 + 2?"}
AGAIN = {"role": "user", "content": "And 3 + 3?"}
CALL = {
    "id": "functions.add:0",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 2}'},
}


def answer(content: str | None, reasoning: str | None = None, **rest: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content} | rest
    return turn if reasoning is None else turn | {"reasoning_content": reasoning}


LOOKS_UP = answer(None, "I must add.", tool_calls=[CALL])
FOUND = {"role": "tool", "tool_call_id": "functions.add:0", "content": "4"}


def renderer(template: str, **extra: Any) -> Any:
    compiled = Environment().from_string(template)
    return lambda messages: compiled.render(messages=messages, **extra)


def whole(template: str, messages: list[dict[str, Any]], **extra: Any) -> str:
    render = renderer(template, **extra)
    return with_answer_reasoning(render(messages), messages, render)


def end(answer: str, reasoning: str) -> str:
    return f"<|im_assistant|>assistant<|im_middle|><think>{reasoning}</think>{answer}<|im_end|>"


def test_the_last_answer_has_its_reasoning_and_earlier_ones_none() -> None:
    messages = [USER, answer("4.", "Two twos."), AGAIN, answer("6.", "Two threes.")]
    assert "Two" not in renderer(KIMI_THINKING)(messages), "the form drops it"
    text = whole(KIMI_THINKING, messages)
    assert text.endswith(end("6.", "Two threes.")) and end("4.", "") in text
    assert text == renderer(KIMI_THINKING)(messages).replace(
        "<think></think>6.", "<think>Two threes.</think>6."
    )


def test_a_chat_is_what_the_model_saw_and_wrote() -> None:
    """The prompt for the answer that a server sends, then what the model wrote after it."""
    asked = renderer(KIMI_THINKING, add_generation_prompt=True)([USER, LOOKS_UP, FOUND])
    messages = [USER, LOOKS_UP, FOUND, answer("4.", "It says 4.")]
    assert whole(KIMI_THINKING, messages) == f"{asked}It says 4.</think>4.<|im_end|>"
    assert "<think>I must add.</think>" in asked


def test_an_answer_that_another_repeats_is_told_apart() -> None:
    messages = [USER, answer("4.", "First."), AGAIN, answer("4.", "Second.")]
    text = whole(KIMI_THINKING, messages)
    assert "First." not in text and text.endswith(end("4.", "Second."))


@pytest.mark.parametrize(
    ("asked", "said", "thought"),
    [("Is 2+2=4?", "Yes.", "2+2=4"), ("2 + 2?", "The answer is 4.", "4.")],
)
def test_reasoning_in_words_of_the_chat_is_put_back_too(
    asked: str, said: str, thought: str
) -> None:
    text = whole(KIMI_THINKING, [USER | {"content": asked}, answer(said, thought)])
    assert text.endswith(end(said, thought))


@pytest.mark.parametrize("form", ["\n", "\n\n", ""])
def test_lines_of_an_empty_block_stay_lines(form: str) -> None:
    template = KIMI_THINKING.replace("<think></think>", f"<think>{form}</think>")
    text = whole(template, [USER, answer("4.", " Two twos.\n")])
    line = "\n" * bool(form)
    assert text.endswith(f"<think>{line}Two twos.{line}</think>4.<|im_end|>")


@pytest.mark.parametrize(
    "messages",
    [
        [USER, answer("4.")],
        [USER, answer("4.", " ")],
        [USER, answer("4.", "Two twos."), AGAIN],
        [USER, answer(f"4.{ANSWER_MARKS[0]}", "Two twos.")],
        [USER],
        [],
    ],
)
def test_text_is_as_the_template_has_it_where_nothing_is_to_be_put_back(
    messages: list[dict[str, Any]],
) -> None:
    assert whole(KIMI_THINKING, messages) == renderer(KIMI_THINKING)(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_keep_it_are_left_alone(name: str) -> None:
    messages = [USER, answer("4.", "Two twos.")]
    render = renderer(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    text, found = render(messages), whole(TEMPLATES[name], messages, eos_token="</s>")
    if name == "deepseek":  # which leaves the end of a block
        assert "Two twos." not in text
        assert found.endswith("<|Assistant|><think>Two twos.</think>4.</s>")
        assert found.count("<think>") == found.count("</think>") == 1
    else:
        assert "Two twos." in text and with_answer_reasoning(text, messages, render) == text


def test_template_that_refuses_the_marks_has_its_own_text() -> None:
    """A chat that it takes is not lost for them."""
    template = (
        "{% for m in messages if m.tool_calls and m.content is not none %}{{ 1 // 0 }}{% endfor %}"
    ) + KIMI_THINKING
    messages = [USER, LOOKS_UP, FOUND, answer("4.", "It says 4.")]
    assert whole(template, messages) == renderer(template)(messages)


def test_without_a_block_nothing_is_put_anywhere() -> None:
    template = KIMI_THINKING.replace("<think></think>", "")
    messages = [USER, answer("4.", "Two twos.")]
    assert whole(template, messages) == renderer(template)(messages)


def test_block_that_has_the_reasoning_in_other_words_is_left_alone() -> None:
    shouted = "<think>{{ m.reasoning_content | upper }}</think>"
    template = KIMI_THINKING.replace("<think></think>", shouted)
    text = whole(template, [USER, answer("4.", "Two twos.")])
    assert text.endswith(end("4.", "TWO TWOS."))


def test_template_that_reads_the_answer_is_left_alone() -> None:
    template = KIMI_THINKING.replace("{{ m.content }}", "{{ m.content | length }}")
    messages = [USER, answer("4.", "Two twos.")]
    assert whole(template, messages) == renderer(template)(messages)


@pytest.mark.parametrize("rule", ["openthoughts", "think_tags"])
def test_documents_of_a_source_have_it_and_count_nothing_as_cut(
    small: Any, tmp_path: Path, rule: str
) -> None:
    marked = {
        "openthoughts": "<|begin_of_thought|>\n\nTwo twos.\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\n4.\n\n<|end_of_solution|>",
        "think_tags": "<think>Two twos.</think>4.",
    }[rule]
    tokenizer = deepcopy(small)
    tokenizer.chat_template = KIMI_THINKING
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, answer(marked)]})
    tally = Tally()
    (text,) = read(path, AsksForAnswers(tokenizer), tally, reasoning=rule)
    assert text.endswith(end("4.", "Two twos.")) and not tally.cut
