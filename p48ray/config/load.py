"""From a YAML file and --set to a RunConfig, and from what is wrong to a message that names the
key."""

import difflib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from p48ray.config import RunConfig
from p48ray.config.addresses import USER_INFO_ERROR
from p48ray.config.documents import DocumentSource
from p48ray.config.section import Section
from p48ray.config.yaml_text import parse_yaml
from p48ray.errors import ConfigError
from p48ray.store.open import scheme_of

EXTENDS = "extends"
"""Names the file whose values count where this one says nothing. It is no key of the
configuration: a plan has what both say."""


def baseline_config(config: RunConfig) -> RunConfig:
    """The published one-shot reference on the same source and texts: SparseGPT masks and GPTQ,
    unweighted tokens, damping 0.1 (DESIGN 7.1)."""
    one_shot = {
        "solver": "sparsegpt_gptq",
        "sparsity": "paired-4:8",
        "router_weight_exponent": 0.0,
        "damp": 0.1,
    }
    plain = {"output_curvature": False, "output_damp": "auto", "refine_steps": 0, "code_sweeps": 0}
    compression = config.compression.model_copy(update=one_shot | plain)
    evaluation = (
        config.evaluation.model_copy(update={"baseline": False}) if config.evaluation else None
    )
    root = config.run.root.rstrip("/")
    source = config.source
    if scheme_of(source.checkpoint).mirror:  # which the run has mirrored by then
        source = source.model_copy(
            update={"checkpoint": f"{root}/source", "endpoint_url": config.run.endpoint_url}
        )
    run = config.run.model_copy(update={"root": f"{root}/baseline"})
    calibration = config.calibration.model_copy(update={"propagate": "dense"})
    changed = {
        "source": source,
        "calibration": calibration,
        "compression": compression,
        "evaluation": evaluation,
        "run": run,
    }
    return config.model_copy(update={"name": f"{config.name}-baseline"} | changed)


def lookup(config: BaseModel, dotted: str) -> object:
    """The value at a dotted key, as plain data; None inside a section that is absent."""
    value: Any = config.model_dump(mode="json")
    for name in dotted.split("."):
        value = None if value is None else value[name]
    return value


def dotted_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration tree; lists count as one key."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        choices = _choices(field.annotation)
        section = next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), None)
        keys += dotted_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def load_config(
    path: str | Path, overrides: tuple[str, ...] = (), run_root: str | None = None
) -> RunConfig:
    """Read a configuration file.

    Args:
        path: YAML file; it may extend another (read_file).
        overrides: 'dotted.key=value' texts, values as parse_value takes them.
        run_root: replaces run.root.
    Raises: ConfigError naming the file, each dotted key, what was expected and what was found.
    """
    tree = read_file(Path(path))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"--set {override!r}: expected dotted.key=value, for instance --set"
                " compression.sweeps=2"
            )
        assign(tree, key, parse_value(key, text))
    if run_root is not None:
        assign(tree, "run.root", run_root)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error))) from None


def read_file(path: Path) -> dict[str, Any]:
    """The tree of a file; with `extends`, laid over that of another one beside it, which extends
    none."""
    tree = read_yaml(path)
    if EXTENDS not in tree:
        return tree
    name = tree.pop(EXTENDS)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: {EXTENDS}: expected a file's name, found {shorten(name)}")
    try:
        below = read_yaml(path.parent / name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {EXTENDS}: {error}") from None
    if EXTENDS in below:
        raise ConfigError(
            f"{path}: {EXTENDS}: expected a file that extends no other, found {name} with"
            f" {EXTENDS}: {shorten(below[EXTENDS])}"
        )
    return laid_over(below, tree)


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of both are joined, key by key; of anything else the upper one counts."""
    joined = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = laid_over(below[key], above[key])
    return joined


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


NULL_WORDS = ("", "~", "null", "Null", "NULL")


def text_kind(dotted: str) -> Literal["text", "mix"] | None:
    """Whether a key's value is a text, or a mix of documents, which may be given as one path."""
    model: Any = RunConfig
    field = None
    for name in dotted.split("."):
        field = getattr(model, "model_fields", {}).get(name)
        if field is None:
            return None
        kinds = _choices(field.annotation)
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
    if field is not None and set(_choices(field.annotation)) <= {str, type(None)}:
        return "text"
    return "mix" if field is not None and field.annotation == tuple[DocumentSource, ...] else None


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def parse_value(key: str, text: str) -> object:
    """The value of --set: YAML, but a text is taken whole, whatever YAML would make of a #, a colon
    or digits in it. Quotes around all of it, and null, mean what they mean in YAML."""
    kind, whole = text_kind(key), text.strip()
    if kind and whole not in NULL_WORDS and not (kind == "mix" and whole[0] in "[{"):
        return _unquoted(whole) if whole[0] in "'\"" else whole
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {key}: value {shorten(text)}: {error}") from None


def _unquoted(text: str) -> str:
    try:
        found = parse_yaml(text)
    except ValueError:
        return text
    return found if isinstance(found, str) and text[-1] == text[0] else text


def assign(tree: dict[str, Any], dotted: str, value: object) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {section!r} holds a value, not a section")
        tree = child
    tree[name] = value


def explain(error: ValidationError) -> list[str]:
    """One line per problem: dotted key, expected, found, and the nearest known key where one was
    misspelt."""
    lines = []
    for item in error.errors(include_url=False):
        dotted = ".".join(
            str(part)
            for part in item["loc"]
            if part not in ("constrained-float", "literal['auto']", "tuple[int, ...]")
        )
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(dotted, dotted_keys(), n=1)
            lines.append(f"{dotted}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"{dotted}: required key is missing")
        elif item["type"] == USER_INFO_ERROR:  # which does not show what was found
            lines.append(f"{dotted}: {item['msg']}")
        elif item["type"] == "value_error":
            lines.append(  # a rule over several sections names its keys itself
                (f"{dotted}: " if dotted else "")
                + str(item["ctx"]["error"])
                + ("" if isinstance(item["input"], dict) else f", found {shorten(item['input'])}")
            )
        else:
            lines.append(
                f"{dotted or 'configuration'}: {item['msg']}, found {shorten(item['input'])}"
            )
    return lines


def shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
