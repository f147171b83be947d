"""What page, card and printed report say of held-out tokens by domain and by position: sparsity
shows first where a model writes for long, and in texts that its calibration has little of."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from p48ray.report.markdown import plain, table_of
from p48ray.stages.cells import stretch_words
from p48ray.stages.evaluate import EvaluationResult, StretchQuality, TextQuality

ONE_SHOT_KL = "one-shot's KL"
SPARSE_KL = "KL on sparse kernels"


class QualityPiece(NamedTuple):
    """A domain or a stretch of positions. `one_shot_kl`, `sparse_kl`: None where there is none."""

    name: str
    num_tokens: int
    source_perplexity: float
    perplexity: float
    kl: float
    one_shot_kl: float | None
    sparse_kl: float | None

    @property
    def more(self) -> float:
        """Perplexity over the source's, as a share of it."""
        return self.perplexity / self.source_perplexity - 1


def piece(name: str, q: TextQuality, baseline: TextQuality | None) -> QualityPiece:
    """Args: q: what the piece shows. baseline: the same of the one-shot reference, if there is
    one."""
    return QualityPiece(
        name=name,
        num_tokens=q.num_tokens,
        source_perplexity=q.source_perplexity,
        perplexity=q.compressed_perplexity,
        kl=q.kl,
        one_shot_kl=baseline.kl if baseline else None,
        sparse_kl=q.in_groups_of_32.kl if q.in_groups_of_32 else None,
    )


def words_of(s: StretchQuality) -> str:
    return stretch_words(s.first, s.last)


def domain_pieces(q: EvaluationResult, baseline: EvaluationResult | None) -> list[QualityPiece]:
    """In the order of the mix; nothing where no source has a name."""
    theirs = {d.name: d for d in baseline.domains} if baseline else {}
    return [piece(d.name, d, theirs.get(d.name)) for d in q.domains]


def stretch_pieces(q: EvaluationResult, baseline: EvaluationResult | None) -> list[QualityPiece]:
    """From the beginning of the sequences on."""
    theirs = {words_of(s): s for s in baseline.stretches} if baseline else {}
    return [piece(words_of(s), s, theirs.get(words_of(s))) for s in q.stretches]


def domains(
    q: EvaluationResult | None, baseline: EvaluationResult | None
) -> Mapping[str, object] | None:
    """Values of domains.html.j2; None where nothing was evaluated.

    Args:
        q: of the checkpoint.
        baseline: of the one-shot reference; None where there is none.
    """
    if q is None or not q.stretches:
        return None
    by_domain, by_stretch = domain_pieces(q, baseline), stretch_pieces(q, baseline)
    return {
        "domains": by_domain,
        "stretches": by_stretch,
        "has_one_shot": any(p.one_shot_kl is not None for p in (*by_domain, *by_stretch)),
        "has_sparse_kernels": any(p.sparse_kl is not None for p in (*by_domain, *by_stretch)),
        "kl_by_both": [(d.name, [s.kl for s in d.stretches]) for d in q.domains],
    }


def domain_tables(q: EvaluationResult, baseline: EvaluationResult | None) -> list[str]:
    """Markdown tables for the card. Args: as `domains` takes them."""
    return [
        pieces_table(name, pieces)
        for name, pieces in (
            ("domain", domain_pieces(q, baseline)),
            ("position in the sequence", stretch_pieces(q, baseline)),
        )
        if pieces
    ]


def pieces_table(name: str, pieces: Sequence[QualityPiece]) -> str:
    """`name`: of the first column."""
    head = [name, "tokens", "source's perplexity", "perplexity", "KL"]
    extra = [
        (title, [getattr(p, field) for p in pieces])
        for title, field in ((ONE_SHOT_KL, "one_shot_kl"), (SPARSE_KL, "sparse_kl"))
    ]
    shown = [(title, values) for title, values in extra if any(v is not None for v in values)]
    rows = [
        [
            plain(p.name),
            f"{p.num_tokens:,}",
            f"{p.source_perplexity:.4f}",
            f"{p.perplexity:.4f}",
            f"{p.kl:.4f}",
            *("" if values[n] is None else f"{values[n]:.4f}" for _, values in shown),
        ]
        for n, p in enumerate(pieces)
    ]
    return table_of([*head, *(title for title, _ in shown)], rows)


def print_domains(q: EvaluationResult | None, console: Console) -> None:
    """A row a domain, with KL by position; nothing where no source has a name."""
    if q is None or not q.domains:
        return
    table = Table(title="by domain; KL by position in the sequence", title_justify="left")
    table.add_column("")
    positions = [words_of(s) for s in q.stretches]
    for column in ("tokens", "source's perplexity", "perplexity", "KL", *positions):
        table.add_column(column, justify="right")
    for d in q.domains:
        table.add_row(
            d.name,
            f"{d.num_tokens:,}",
            f"{d.source_perplexity:.4f}",
            f"{d.compressed_perplexity:.4f}",
            f"{d.kl:.4f}",
            *(f"{s.kl:.4f}" for s in d.stretches),
        )
    console.print(table)
