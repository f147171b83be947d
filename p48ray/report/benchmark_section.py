"""The table of benchmarks, for report.html and for a terminal.

A figure that is missing is an empty cell.
"""

from rich.console import Console
from rich.table import Table

from p48ray.report.fold import Values
from p48ray.run.benchmark_results import BenchmarkTable, table_notes, table_rows


def cells(table: BenchmarkTable, with_errors: bool = True) -> tuple[list[str], list[list[str]]]:
    """Head and body, plain text. with_errors: standard errors behind figures that have one."""
    head = ["", "", *(c.title for c in table.columns), "Δ to base", "recovery"]
    body = []
    for row in table_rows(table):
        found: list[str] = [row.label, row.setting]
        for column in table.columns:
            value = getattr(row, column.role)
            error = column.stderr.get(row.task or "") if with_errors else None
            beside = "" if error is None else f" ± {error:.2f}"
            found.append("" if value is None else f"{value:.2f}{beside}")
        found.append("" if row.delta is None else f"{row.delta:+.2f}")
        found.append("" if row.recovery is None else f"{row.recovery:.1f}%")
        body.append(found)
    return head, body


def benchmarks(table: BenchmarkTable | None) -> Values | None:
    """Values of benchmarks.html.j2; None where no benchmark was run."""
    if table is None or not any(c.values for c in table.columns):
        return None
    head, rows = cells(table)
    return {"head": head, "rows": rows, "notes": " ".join(table_notes(table))}


def print_benchmarks(table: BenchmarkTable, console: Console) -> None:
    head, body = cells(table)
    shown = Table(title="benchmarks, per cent", title_justify="left")
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i < 2 else "right")
    for row in body:
        shown.add_row(*row)
    console.print(shown)
    for note in table_notes(table):
        console.print(note, soft_wrap=True)
