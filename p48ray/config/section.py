"""What every section of the configuration has in common.

Every key has a description, which docs/CONFIG.md shows (p48ray/config_page.py). That of a number
begins with its unit in brackets: `Field(8, gt=0, description="[sequences] Of one part.")`.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: immutable, closed to unknown keys, strict about types (yaml gives the
    right ones)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def as_tuple(value: object) -> object:
    """YAML's lists become the tuples of frozen models."""
    return tuple(value) if isinstance(value, list) else value
