"""What was read of a source of texts, what was skipped or cut of it, and whether that is too much.

A row is skipped for one reason. What is cut is counted by rows too: a row may have lost several
things and still be a document.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, RowSkippedError

EMPTY_ROW = "empty"
"""Of such rows nothing is lost: they are counted, and any number of them is allowed."""
ENOUGH_ROWS = 10_000
"""Of a source that is not read whole, after which its share of skipped rows is looked at."""


@dataclass(slots=True)
class Tally:
    """Counts of one source. `first`: by reason, place and detail of the first row skipped for it.
    `characters` are those of the documents, `tokens` those that were made of them."""

    rows: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def num_unusable(self) -> int:
        """Skipped rows that had something in them."""
        return self.skipped.total() - self.skipped[EMPTY_ROW]

    def skip(self, where: str, error: RowSkippedError) -> None:
        """Count a row that is of no use. Args: where: names its place."""
        self.rows += 1
        self.skipped[error.reason] += 1
        self.first.setdefault(error.reason, f"{where}: {error}")

    def take(self, text: str, cut: set[str]) -> None:
        """Count a document. Args: text: as it is used. cut: what its row has lost."""
        self.rows += 1
        self.documents += 1
        self.characters += len(text)
        self.cut.update(cut)

    def copy(self) -> "Tally":
        """Of its own, as it is now."""
        return Tally(**self._values())

    def become(self, other: "Tally") -> None:
        """Count from where another one is."""
        for name, value in other._values().items():
            setattr(self, name, value)

    def _values(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v if isinstance(v, int) else v.copy() for n, v in values.items()}

    def check(self, source: DocumentSource) -> None:
        """Raises: CalibrationError when more rows were skipped than the source allows; it names the
        first one of the most frequent reason."""
        if self.num_unusable <= source.max_skipped_share * self.rows:
            return
        by_count = [reason for reason, _ in self.skipped.most_common() if reason != EMPTY_ROW]
        raise CalibrationError(
            f"{self.first[by_count[0]]} (the first of {self.num_unusable:,} skipped of"
            f" {self.rows:,} rows read of {source.path}: {self.spell_skipped()}; max_skipped_share:"
            f" {source.max_skipped_share:g})"
        )

    def spell_skipped(self) -> str:
        """Reasons with their counts, the most frequent first."""
        return spell_counts(self.skipped) or "none"


def spell_counts(counts: dict[str, int]) -> str:
    """'3 empty, 1 null': the most frequent first, equal ones by name."""
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in items)
