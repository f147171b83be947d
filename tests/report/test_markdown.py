"""Others' text in the card, against the rules of the Hub's Markdown."""

import html

import pytest

from p48ray.report.markdown import code, fenced, plain, table_of

TEXTS = ["a|b", "<b>", "a & b", "&lt;", "**x**", "_x_", "[a](b)", "~~x~~", "$x$", "a\\|b", "`x`"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_nothing_left_that_begins_markup_and_reads_the_same(text: str) -> None:
    written = plain(text)
    assert html.unescape(written) == text
    assert not set("|<>*`[]~$\\") & set(written)
    assert table_of(("head",), [[written]]).splitlines()[2] == f"| {written} |"
    if text != "_x_":  # which a code span shows as it is
        assert html.unescape(code(text)) == f"<code>{text}</code>"


def test_words_stay_as_they_are() -> None:
    assert plain("acc_norm 5-shot, A100-SXM4 (80 GB)") == "acc_norm 5-shot, A100-SXM4 (80 GB)"
    assert plain(" a\n\n# b\t c ") == "a &#35; b c"
    assert code("LICENSE-2.0 b") == "`LICENSE-2.0 b`"


def test_fence_is_longer_than_any_inside() -> None:
    assert fenced("a\n", "yaml") == "```yaml\na\n```"
    assert fenced("```\na\n`````").splitlines()[::4] == ["``````", "``````"]
