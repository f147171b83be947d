"""The project's texts: links lead somewhere, what is generated is current, and no line misleads."""

import ast
import re
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from p48ray import config_page
from p48ray.config.load import dotted_keys
from tests.conftest import REPO

README = REPO / "README.md"
DESIGN = REPO / "docs" / "DESIGN.md"
THIS_FILE = Path(__file__).resolve()
FOLDERS = (
    *("p48ray", "jobs", "tests", "bench", "docs"),
    *("infra", "configs", "examples", "findings", ".ci"),
)
SUFFIXES = {".md", ".py", ".yaml", ".toml", ".sh", ".txt"}
NAMES = {"Makefile", "Dockerfile", "run"}
LEAVES = dict(config_page.all_settings())


@cache
def project_texts() -> dict[str, str]:
    """Every text of the repository by its path, but for this file."""
    below = [path for folder in FOLDERS for path in (REPO / folder).rglob("*")]
    files = [path for path in (*REPO.iterdir(), *below) if path.is_file() and path != THIS_FILE]
    texts = [path for path in files if path.suffix in SUFFIXES or path.name in NAMES]
    return {path.relative_to(REPO).as_posix(): path.read_text() for path in sorted(texts)}


PAGES = [name for name in project_texts() if name.endswith(".md")]


USER_PAGES = [
    "README.md",
    *(name for name in PAGES if re.fullmatch(r"docs/[a-z-]+\.md", name)),
    "docs/DESIGN.md",
    "docs/ROADMAP.md",
]


def without_code(text: str) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    kept = (c for c in plain if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def headings(path: Path) -> list[str]:
    plain = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.M | re.S)
    return re.findall(r"^#+ +(.+?) *$", plain, flags=re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    text = without_code((REPO / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, wanted = target.partition("#")
        path = (REPO / page).parent / name if name else REPO / page
        assert path.exists(), f"{page}: {target}"
        if wanted:
            assert wanted in map(anchor, headings(path)), f"{page}: {target}"


def test_a_heading_becomes_the_anchor_that_links_use() -> None:
    assert anchor("7.3 Two-sided block descent") == "73-two-sided-block-descent"
    assert anchor("`run.keep`, and [more](x.md)") == "runkeep-and-more"


def blocks(page: str) -> str:
    """The fenced blocks of a page, lines that end with a backslash joined."""
    found = re.findall(r"^ *```\w*\n(.*?)^ *```", (REPO / page).read_text(), flags=re.M | re.S)
    return "\n".join(found).replace("\\\n", " ")


@pytest.mark.parametrize("page", USER_PAGES)
def test_commands_of_a_page_exist(page: str) -> None:
    """Scripts, configurations, targets, subcommands and flags that a page tells to type."""
    text = blocks(page)
    for name in re.findall(r"(?:python|--config) ((?:jobs|bench|configs)/\S+)", text):
        assert (REPO / name).is_file(), name
    targets = (REPO / "Makefile").read_text()
    for target in re.findall(r"^(?:.*&& )?make ([\w-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", targets, flags=re.M), target
    files = ("cli.py", "checkpoint_commands.py")
    commands = {name: o for file in files for name, o in options(REPO / "p48ray" / file).items()}
    for command, rest in re.findall(r"^p48ray ([\w-]+)(.*)", text, flags=re.M):
        known = commands[command.replace("-", "_")]
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{command}{rest}"
    for job, rest in re.findall(r"python jobs/(\w+)\.py(.*)", text):
        known = set.union(*options(REPO / "jobs" / f"{job}.py").values())
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{job}{rest}"


def options(path: Path) -> dict[str, set[str]]:
    """Function of a file -> the options that typer makes of its arguments: those that are named in
    one, else the argument's own name."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            named = [
                set(re.findall(r"['\"](--[a-z-]+)['\"]", ast.unparse(a)))
                or {f"--{a.arg.replace('_', '-')}"}
                for a in node.args.args
            ]
            found[node.name] = set().union(*named)
    return found


def test_options_are_those_that_typer_makes() -> None:
    assert options(REPO / "jobs" / "compress.py")["main"] == {
        "--config",
        "--run-root",
        "--set",
        "--dry-run",
        "--texts",
        "--verbose",
    }


@pytest.mark.parametrize("page", USER_PAGES)
def test_settings_of_a_page_exist(page: str) -> None:
    """`run.keep: units`, `--set run.layers=[1]` and such name keys of the configuration."""
    text = (REPO / page).read_text()
    sections = {key.split(".")[0] for key in dotted_keys()} - {"name"}
    named = re.findall(rf"(?:`|--set )((?:{'|'.join(sections)})\.[a-z_.]+)", text)
    known = {key[: place.start()] for key in dotted_keys() for place in re.finditer(r"\.|$", key)}
    assert [key for key in named if key not in known] == []


def test_readme_stays_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert {number: line for number, line in enumerate(lines, 1) if len(line) > 100} == {}


def test_configuration_page_is_current() -> None:
    made, held = config_page.page(), (REPO / "docs" / "CONFIG.md").read_text()
    assert made == held, "run: .venv/bin/python -m p48ray.config_page > docs/CONFIG.md"


def test_configuration_page_has_every_key_once() -> None:
    assert sorted(LEAVES) == sorted(dotted_keys())
    shown = re.findall(r"^- (`[a-z_.]+`(?:,\s+`[a-z_.]+`)*):", config_page.page(), flags=re.M)
    keys = re.findall(r"`([a-z_.]+)`", "\n".join(shown))
    entries = [name for model in config_page.LISTS for name in model.model_fields]
    assert sorted(keys) == sorted([*dotted_keys(), *entries])


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_has_a_description(key: str) -> None:
    assert len(LEAVES[key].description or "") > 10


@pytest.mark.parametrize("key", LEAVES)
def test_every_number_has_a_unit(key: str) -> None:
    words = config_page.spell_type(LEAVES[key].annotation, LEAVES[key].metadata)
    is_number = re.match(r"(integer|number|`\d+`)", words.removeprefix("`auto` or "))
    if is_number and not key.endswith(".seed"):
        assert config_page.UNIT.match(LEAVES[key].description or ""), words


def test_configuration_page_is_what_the_command_writes() -> None:
    command = [sys.executable, "-m", "p48ray.config_page"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == config_page.page()


def test_every_reference_to_the_design_leads_to_a_heading() -> None:
    """`DESIGN 7.3` is that number's heading of docs/DESIGN.md; an anchor is held against it too."""
    numbers = {heading.split()[0].rstrip(".") for heading in headings(DESIGN)}
    anchors = set(map(anchor, headings(DESIGN)))
    for name, text in project_texts().items():
        for found in re.findall(r"\bDESIGN\b(?!\.md)\s*(\d+(?:\.\d+)?)?", text):
            assert found in numbers, f"{name}: DESIGN {found}"
        for found in re.findall(r"DESIGN\.md#([\w-]+)", text):
            assert found in anchors, f"{name}: DESIGN.md#{found}"


def test_no_merge_has_left_its_marks() -> None:
    marks = re.compile(r"^(<{7} |>{7} |={7}$)", re.MULTILINE)
    assert [name for name, text in project_texts().items() if marks.search(text)] == []


def test_nobody_is_sent_to_the_laboratory() -> None:
    """The script behind the first figures is not in the repository; docs/LOG.md has its figures."""
    found = [name for name, text in project_texts().items() if re.search(r"\blab\b", text)]
    assert found == []


TOOLS, VERBS = "pip3?|pipx|uv|conda|poetry", "install|add|run"
INSTALL = re.compile(rf"\b(?:{TOOLS})\b[^\n`]*\b(?:{VERBS})\b([^\n`;&|]*)")


def installed_by_name(text: str) -> list[str]:
    """Arguments of install commands that an index would be asked for as p48ray."""
    words = [word.strip("'\"();,.") for line in INSTALL.findall(text) for word in line.split()]
    return [word for word in words if re.match(r"p48ray\b(?![/.])", word)]


def test_nobody_is_told_to_install_p48ray_from_an_index() -> None:
    """The name is free there, and whoever takes it would be installed."""
    texts = project_texts()
    assert [name for name, text in texts.items() if installed_by_name(text)] == []
    assert [name for name, text in texts.items() if "p48ray[" in text] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pip install 'p48ray[eval]'", ["p48ray[eval]"]),
        ("pip install --upgrade p48ray==1", ["p48ray==1"]),
        ("uv pip install p48ray", ["p48ray"]),
        ("pip install --constraint constraints.txt --editable '.[eval]'", []),
        ("pip install . && p48ray verify FOLDER", []),
    ],
)
def test_install_commands_are_read(line: str, found: list[str]) -> None:
    assert installed_by_name(line) == found
