"""docs/CONFIG.md, from the models of the configuration: every key with its type, default and unit.

    python -m p48ray.config_page > docs/CONFIG.md

A number's description begins with its unit in brackets (config.section). Whether a key is bound
to the plan's digest is asked of `plan.SETTINGS`.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from p48ray.config import RunConfig
from p48ray.config.benchmarks import BenchmarkTask
from p48ray.config.documents import DocumentSource
from p48ray.config.section import Section
from p48ray.run.plan import SETTINGS

WIDTH = 100
UNIT = re.compile(r"^\[(.+?)\] ")
EFFECTS = {
    "units": "**Changes bytes.**",
    "checkpoint": "**Changes the checkpoint**, not its units.",
    "free": "Free.",
}
NOTHING = type(None)
WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    NOTHING: "null",
}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
HEAD = """\
# The configuration

Made by `python -m p48ray.config_page > docs/CONFIG.md` from the models in `p48ray/config/`.
Change a description there and run it again; a test compares.

One YAML file maps to this tree. A key that is not here is refused. Later sources win: the
defaults, the file, `--set dotted.key=value`, `--run-root`. Examples: the files in `configs/`.
A file with `extends: NAME` at its top is laid over the file NAME beside it, section by section;
lists are replaced whole.
`DESIGN 7.3` is that section of [DESIGN.md](DESIGN.md).

Every key says whether it changes the checkpoint's bytes:

- **Changes bytes**: of units. A run root that holds another value refuses to go on, by the name of
  the key.
- **Changes the checkpoint**, not its units: until a checkpoint is finished, a run with another
  value goes on with the units that are there. (`run.layers` changes units under
  `calibration.propagate: compressed`.)
- Free: it may be different when a run is resumed. No output byte of the job depends on it, except
  where its description says so.
"""
LISTS: dict[type[Section], str] = {
    DocumentSource: "Entries of `calibration.documents` and `evaluation.documents`",
    BenchmarkTask: "Entries of `benchmarks.tasks`",
}


def section_of(annotation: object) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    is_choice = get_origin(annotation) in (Union, UnionType)
    choices = get_args(annotation) if is_choice else (annotation,)
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), None)


def all_settings(
    model: type[Section] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value: its dotted name and its field."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from all_settings(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def sections(
    model: type[Section] = RunConfig,
    prefix: str = "",
) -> Iterator[tuple[str, type[Section], bool]]:
    """Every section, the root first: its dotted name, its model, and whether it may be left out."""
    yield prefix, model, False
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            below = sections(section, f"{prefix}.{name}".lstrip("."))
            place, held, _ = next(below)
            yield place, held, field.default is None
            yield from below


def spell_type(annotation: Any, metadata: list[Any]) -> str:
    """A field's type and limits in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return spell_type(inner[0], [*inner[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        choices = [(choice, [] if choice is NOTHING else metadata) for choice in inner]
        return " or ".join(spell_type(*choice) for choice in choices)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        item = inner[0]
        return "list of entries" if item in LISTS else f"list of {WORDS[item]}s"
    flat = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
    bounds = [(m, key) for m in flat for key in LIMITS if hasattr(m, key)]
    limits = [f"{LIMITS[key]} {getattr(m, key):,}" for m, key in bounds]
    return " ".join([WORDS[annotation], " and ".join(limits)]).strip()


def spell_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**Required.**"
    if isinstance(field.default, tuple) and isinstance(field.default[0], Section):
        return f"Default: {len(field.default)} entries."
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
    return f"Default: `{text}`."


def entry(keys: list[str], field: FieldInfo, effect: str) -> str:
    """One key, or several that mean the same in sections of one kind."""
    text = field.description or ""
    unit = UNIT.match(text)
    facts = [f"{spell_type(field.annotation, field.metadata)}.", spell_default(field)]
    facts += [f"Unit: {unit[1]}."] if unit else []
    facts += [effect] if effect else []
    names = ", ".join(f"`{key}`" for key in keys)
    head = wrapped(f"- {names}: {' '.join(facts)}", below="  ")
    body = wrapped(text[unit.end() :] if unit else text, first="  ", below="  ")
    return f"{head}\n{body}\n"


def wrapped(text: str, first: str = "", below: str = "") -> str:
    """Lines of at most WIDTH columns; `first` and `below` begin the first line and the others."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )


def about(model: type[Section]) -> str:
    """The first paragraph of a section's docstring."""
    return wrapped(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0])


def page() -> str:
    """The whole of docs/CONFIG.md."""
    lines = [HEAD]
    places: dict[type[Section], list[tuple[str, bool]]] = {}
    for place, model, is_optional in sections():
        places.setdefault(model, []).append((place, is_optional))
    for model, found in places.items():
        marks = [(place, " (optional)" if is_optional else "") for place, is_optional in found]
        names = ", ".join(f"`{place}`{mark}" for place, mark in marks)
        lines.append(f"## {names if found[0][0] else 'Top level'}\n\n{about(model)}\n")
        for name, field in model.model_fields.items():
            if section_of(field.annotation) is None:
                keys = [f"{place}.{name}".lstrip(".") for place, _ in found]
                (effect,) = {EFFECTS[SETTINGS[key]] for key in keys}
                lines.append(entry(keys, field, effect))
    for model, title in LISTS.items():
        lines.append(f"## {title}\n\n{about(model)}\n")
        lines += [entry([name], field, "") for name, field in model.model_fields.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
