"""YAML in a configuration: what it may not be, and that a few lines never become many values."""

from pathlib import Path

import pytest
import yaml

from p48ray.config.load import load_config
from p48ray.config.yaml_text import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, parse_yaml
from p48ray.errors import ConfigError
from tests.conftest import REPO

TINY_CONFIG = REPO / "configs" / "tiny.yaml"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_files_mean_what_the_library_says(path: Path) -> None:
    assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None),
        ("# nothing", None),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("{1: a, '1': b}", {1: "a", "1": "b"}),
    ],
)
def test_plain_data_aliases_and_merges_are_read(text: str, data: object) -> None:
    assert parse_yaml(text) == data


def bomb(levels: int, width: int) -> str:
    """A list of `width` values that each level repeats `width` times."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {a: 1}\nname: x\nrun: {b: 2}", r"line 3: run: expected once, found in line 1 too"),
        ("a: {seed: 1, seed: 2}", r"line 1: seed: expected once"),
        (bomb(9, 9), rf"expected at most {MAX_VALUES:,} values, found [\d,]+ \(an alias repeats"),
        ("a: &a {<<: [*b]}", "not valid YAML: found undefined alias"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"expected at most {MAX_DEPTH} levels"),
        ("[" * 5000 + "]" * 5000, f"expected at most {MAX_DEPTH} levels"),
        (
            "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 40)),
            f"expected at most {MAX_DEPTH} levels",
        ),
        ("a: &a [*a]", "found an alias of what it stands in"),
        ("x" * (MAX_CHARACTERS + 1), "expected at most 1,048,576 characters, found 1,048,577"),
        ("a: 2026-13-41", "not valid YAML: ValueError: month"),
        ("a: !!int ''", "not valid YAML: IndexError"),
        ("a: !!bool maybe", "not valid YAML: KeyError"),
        ("a: !!timestamp x", "not valid YAML: AttributeError"),
        ("a: " + "1" * 5000, "not valid YAML: ValueError: Exceeds the limit"),
        ("a: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("a: [", "not valid YAML: while parsing"),
    ],
    ids=lambda value: value[:20],
)
def test_text_that_no_person_wrote_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_as_many_values_as_are_allowed_are_read() -> None:
    width = int(MAX_VALUES**0.5) - 2
    found = parse_yaml(bomb(2, width))
    assert isinstance(found, dict) and len(found["a1"]) == width
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


def test_file_and_option_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TINY_CONFIG.read_text() + "\nrun: {root: elsewhere}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: line \d+: run: expected once"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"^--set run: value .*: line 1: root: expected once"):
        load_config(TINY_CONFIG, ("run={root: a, root: b}",))
