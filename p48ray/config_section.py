"""What every section of the configuration has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: immutable, closed to unknown keys, strict about types (yaml gives the right ones)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def as_tuple(value: object) -> object:
    """YAML's lists become the tuples of frozen models."""
    return tuple(value) if isinstance(value, list) else value
