"""YAML as files and options hold it: plain data, nothing said twice, and no more of it than a
person writes.

A text of a few lines can stand for more values than a memory holds (each alias repeats what it
names), and the library builds them all. So its nodes are counted before anything is made of them.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import yaml

MAX_CHARACTERS = 2**20
MAX_VALUES = 100_000
"""Values of a text, each counted as often as aliases repeat it."""
MAX_DEPTH = 32
"""Mappings and lists inside each other."""
MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_yaml(text: str) -> object:
    """The plain data that a text means.

    Raises: ValueError in words, with line and column, for what is no YAML, says a key twice, or is
        larger, deeper or more repeated than the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expected at most {MAX_CHARACTERS:,} characters, found {len(text):,}")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, 1, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, found more") from None
    except _LimitError:
        raise
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    # what the library's constructors raise for 2026-13-41, for !!int "" and for !!bool maybe
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"not valid YAML: {type(error).__name__}: {error}") from None
    finally:
        loader.dispose()


class _LimitError(ValueError):
    """A limit of this module, in its own words."""


@dataclass(frozen=True, slots=True)
class _Extent:
    """Of a node with all that is in it: values, and levels of mappings and lists."""

    values: int
    levels: int


def _measure(node: yaml.Node, depth: int, measured: dict[int, _Extent], above: set[int]) -> _Extent:
    """What a node stands for, aliases written out.

    Args:
        node: to measure.
        depth: nodes around it, and itself.
        measured: those that were met before, by id; added to.
        above: ids of the nodes around this one.
    Raises: _LimitError.
    """
    where = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
    if id(node) in above:
        raise _LimitError(f"{where}: expected values, found an alias of what it stands in")
    if id(node) not in measured:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        above.add(id(node))
        inner = [_measure(child, depth + 1, measured, above) for child in children]
        above.remove(id(node))
        measured[id(node)] = _Extent(
            1 + sum(extent.values for extent in inner),
            1 + max((extent.levels for extent in inner), default=0),
        )
    found = measured[id(node)]
    if depth - 1 + found.levels > MAX_DEPTH:
        raise _LimitError(f"{where}: expected at most {MAX_DEPTH} levels, found more")
    if found.values > MAX_VALUES:
        raise _LimitError(
            f"{where}: expected at most {MAX_VALUES:,} values, found {found.values:,} (an alias"
            " repeats all that it names)"
        )
    return found


def _refuse_repeated(node: yaml.MappingNode) -> None:
    """The library would keep the last of them and drop the others."""
    seen: dict[Hashable, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE_TAG:
            continue
        first = seen.setdefault((key.tag, key.value), key)
        if first is not key:
            raise _LimitError(
                f"line {key.start_mark.line + 1}: {key.value}: expected once, found in line"
                f" {first.start_mark.line + 1} too"
            )
