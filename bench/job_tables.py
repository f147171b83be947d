"""The tables that bench/job.py ends with: the most important last, because of a long output often
only the end is kept."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 118


def print_facts(facts: Mapping[str, Any]) -> None:
    """All tables of one measured job."""
    console = Console(width=WIDTH)
    for table in (
        pairs("units", facts["units"]),
        pairs("peaks", facts["peaks"]),
        plan_table(facts["plan"]),
        *stage_tables(facts),
    ):
        console.print(table)
    killed = facts["killed"]
    if killed:
        console.print(
            f"killed: {killed['what']} {killed['pid']} in {killed['stage']}, {killed['units']}"
            " units done"
        )
    console.print(
        f"{facts['tree']['commit']}: exit codes {facts['exit_codes']}, units' digest"
        f" {facts['digest'][:16]}"
    )


def stage_tables(facts: Mapping[str, Any]) -> Iterable[Table]:
    """Time, and bytes, of each stage and of the job by kind of span."""
    rows = {**facts["stages"], "job": facts["job"]}
    seconds = new_table(
        "seconds by stage, and summed over threads by kind", "", "from", "wall", "GPU busy"
    )
    num_bytes = new_table("bytes by stage", "")
    kinds = sorted({kind for row in rows.values() for kind in row["host_seconds"]})
    moved = sorted({kind for row in rows.values() for kind in row["bytes"]})
    for table, columns in ((num_bytes, moved), (seconds, kinds)):
        for kind in columns:
            table.add_column(kind, justify="right")
    for name, row in rows.items():
        busy = "-" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}"
        hosts = [
            f"{row['host_seconds'][kind]:.1f}" if kind in row["host_seconds"] else ""
            for kind in kinds
        ]
        seconds.add_row(name, f"{row['start_s']:.1f}", f"{row['seconds']:.1f}", busy, *hosts)
        num_bytes.add_row(
            name, *(size(row["bytes"][kind]) if kind in row["bytes"] else "" for kind in moved)
        )
    return ([num_bytes] if moved else []) + [seconds]


def plan_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = new_table("plan against actual", "", "planned", "actual", "actual/planned")
    for row in rows:
        planned, actual = row["planned"], row["actual"]
        share = f"{actual / planned:.3f}" if planned and actual is not None else ""
        table.add_row(row["name"], figure(row["name"], planned), figure(row["name"], actual), share)
    return table


def pairs(title: str, values: Mapping[str, Any]) -> Table:
    """Name and value, one a line; inner mappings in one line."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else None
        kind = name if inner is None or not name.endswith("_bytes") else "_bytes"
        text = (
            ", ".join(f"{key} {figure(kind, item)}" for key, item in inner)
            if inner is not None
            else figure(name, value)
        )
        table.add_row(name, text)
    return table


def new_table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, min_width=len(title)
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def figure(name: str, value: Any) -> str:
    """A value as its name says what it is: bytes, seconds, or a number."""
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_seconds"):
        return f"{value:.2f} s"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(num_bytes: float) -> str:
    """Decimal units, as a plan prints them, but never rounded to nothing."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"
