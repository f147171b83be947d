"""The base of all stored records: immutable, closed to unknown keys, strict JSON both ways."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from p48ray.errors import NumericsError, ObjectMissingError, ShardCorruptError
from p48ray.store.base import Store

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 32


class Record(BaseModel):
    """A frozen fact that lies in the bucket as one JSON object."""

    # a number that is not finite is to be seen in the text: by default it is written as null
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def to_json(self) -> bytes:
        """UTF-8 JSON, keys in the order of declaration, one trailing newline.

        Raises: NumericsError, naming the field, for a number that is not finite: JSON has none, and
            no reader would take it.
        """
        text = self.model_dump_json(indent=1)
        # texts may hold these words too; only then is every field looked at
        if "NaN" in text or "Infinity" in text:
            refuse_not_finite(type(self).__name__, self.model_dump(), ())
        return (text + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse strictly. Raises ShardCorruptError naming the object and the field."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "(whole object)"
            raise ShardCorruptError(
                f"{where}: not a {cls.__name__}: {field}: {first['msg']}"
            ) from None

    @classmethod
    def load(cls, store: Store, key: str) -> Self:
        return cls.from_json(store.get(key), f"{store.uri}/{key}")

    @classmethod
    def load_all(cls, store: Store, keys: Iterable[str]) -> list[Self]:
        """Many records at once, in order; a bucket answers each in tens of milliseconds, so they
        are asked for side by side."""
        with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
            return list(pool.map(lambda key: cls.load(store, key), keys))


def refuse_not_finite(kind: str, value: object, path: tuple[str, ...]) -> None:
    """Look through what a record of a kind holds at a path.

    Raises: NumericsError for the first number that is not finite.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_not_finite(kind, inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            refuse_not_finite(kind, inner, (*path, str(place)))
    elif isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(
            f"{kind}: {'.'.join(path)}: expected a finite number, found {value}; nothing was"
            " written"
        )


R = TypeVar("R", bound=Record)


def load_readable(record: type[R], store: Store, keys: Sequence[str]) -> dict[str, R]:
    """Those of the records that can be read, by key; for whoever only looks on. A run makes the
    others anew, or names them."""

    def load(key: str) -> R | None:
        try:
            return record.load(store, key)
        except ObjectMissingError:
            return None  # deleted since it was listed
        except ShardCorruptError as error:
            log.warning("%s; `p48ray doctor` says what to do", error)
            return None

    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        found = dict(zip(keys, pool.map(load, keys), strict=True))
    return {key: loaded for key, loaded in found.items() if loaded is not None}


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys are not known yet.

    Raises: ShardCorruptError naming the place.
    """
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ShardCorruptError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ShardCorruptError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def canonical_json(value: object) -> bytes:
    """One spelling per value, so that digests of equal values are equal."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()
