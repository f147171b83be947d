"""The known families: every file of this package that defines FAMILY. Nothing lists them, so that a
new family is a new file."""

import pkgutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import MappingProxyType

from p48ray.checkpoint.families.record import Family
from p48ray.errors import P48Error

PACKAGE = __name__.rpartition(".")[0]


def find_families(package: str) -> Mapping[str, Family]:
    """model_type -> family, in the order of the files' names.

    Raises: P48Error if a FAMILY is something else, or if two files claim one model_type.
    """
    found: dict[str, Family] = {}
    for name in module_names(package):
        family = getattr(import_module(f"{package}.{name}"), "FAMILY", None)
        if family is None:
            continue
        if not isinstance(family, Family):
            raise P48Error(
                f"{package}.{name}: expected FAMILY to be a Family, found {type(family).__name__}"
            )
        if family.model_type in found:
            raise P48Error(f"{package}.{name}: model_type {family.model_type!r} has a file already")
        found[family.model_type] = family
    return MappingProxyType(found)


def module_names(package: str) -> Iterable[str]:
    return sorted(module.name for module in pkgutil.iter_modules(import_module(package).__path__))


FAMILIES: Mapping[str, Family] = find_families(PACKAGE)
