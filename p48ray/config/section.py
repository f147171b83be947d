"""What every section of the configuration has in common.

Every key has a description, which docs/CONFIG.md shows (p48ray/config_page.py). That of a number
begins with its unit in brackets: `Field(8, gt=0, le=99, description="[sequences] Of one part.")`.
Every number has a least and a greatest value: what no run could mean is refused by its key, not by
running out of memory.
"""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SIZE_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}

MAX_BYTES = 10**18


class Section(BaseModel):
    """Base of all sections: immutable, closed to unknown keys, strict about types (yaml gives the
    right ones)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def as_tuple(value: object) -> object:
    """YAML's lists become the tuples of frozen models."""
    return tuple(value) if isinstance(value, list) else value


def parse_size(value: object) -> object:
    """'4.5GB', '512 MiB' or a number of bytes -> bytes."""
    if isinstance(value, str) and (
        found := re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", value)
    ):
        factor = SIZE_UNITS.get(found[2].upper())
        if factor is not None:
            return int(float(found[1]) * factor)
    if not isinstance(value, int):
        raise ValueError(
            "expected a size such as 5GB, 512MiB or a number of bytes (units:"
            f" {', '.join(filter(None, SIZE_UNITS))})"
        )
    return value


Count = Annotated[int, Field(gt=0, le=10**4)]
SizeBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_BYTES)]
