"""Values that are not finite, counted in the bytes of a stored tensor.

A value is not finite if all bits of its exponent are set. Formats without infinities have one
pattern for NaN, and no infinity is ever counted in them. Bits are compared, so that no format has
to be converted first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class _Bits:
    """A float format. all_set: bits that are all set where a value is not finite. mantissa: bits of
    which one is set for NaN; 0 where there is no infinity."""

    unsigned: type[np.unsignedinteger]
    all_set: int
    mantissa: int

    @property
    def sign(self) -> int:
        return 1 << (8 * np.dtype(self.unsigned).itemsize - 1)


_FLOATS: Mapping[str, _Bits] = MappingProxyType(
    {
        "F64": _Bits(np.uint64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
        "F32": _Bits(np.uint32, 0x7F80_0000, 0x007F_FFFF),
        "F16": _Bits(np.uint16, 0x7C00, 0x03FF),
        "BF16": _Bits(np.uint16, 0x7F80, 0x007F),
        "F8_E5M2": _Bits(np.uint8, 0x7C, 0x03),
        "F8_E4M3": _Bits(np.uint8, 0x7F, 0),
        "F8_E8M0": _Bits(np.uint8, 0xFF, 0),
    }
)
FLOAT_DTYPES = frozenset(_FLOATS)
"""safetensors' names of the dtypes in which a value can be something else than finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """Values of one tensor that are not finite. first: index of the first one; None without any."""

    first: tuple[int, ...] | None = None
    num_nan: int = 0
    num_inf: int = 0
    num_minus_inf: int = 0

    def __bool__(self) -> bool:
        return self.first is not None

    def __str__(self) -> str:
        """3 NaN and 1 -inf, the first at [0, 17]."""
        kinds = ((self.num_nan, "NaN"), (self.num_inf, "inf"), (self.num_minus_inf, "-inf"))
        counts = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
        return f"{counts}, the first at {list(self.first or ())}"


class FiniteCheck:
    """Looks at the bytes of one tensor as they come, in pieces of whole values."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Args: dtype: safetensors' name; of an integer nothing is counted."""
        self.bits, self.shape = _FLOATS.get(dtype), shape
        self.num_seen, self.found = 0, NotFinite()

    def add(self, data: bytes | memoryview) -> None:
        """The next piece, in the order of the file."""
        if self.bits is None:
            return
        values = np.frombuffer(data, dtype=self.bits.unsigned)
        is_bad = (values & self.bits.all_set) == self.bits.all_set
        if is_bad.any():
            self._count(values[is_bad], int(is_bad.argmax()))
        self.num_seen += len(values)

    def _count(self, bad: NDArray[np.unsignedinteger], first: int) -> None:
        assert self.bits is not None
        before = self.found
        has_infinity = self.bits.mantissa != 0
        is_inf = ((bad & self.bits.mantissa) == 0) & has_infinity
        is_negative = (bad & self.bits.sign) != 0
        place = tuple(int(at) for at in np.unravel_index(self.num_seen + first, self.shape or (1,)))
        self.found = NotFinite(
            first=before.first if before else place[: len(self.shape)],
            num_nan=before.num_nan + int((~is_inf).sum()),
            num_inf=before.num_inf + int((is_inf & ~is_negative).sum()),
            num_minus_inf=before.num_minus_inf + int((is_inf & is_negative).sum()),
        )
