"""Benchmarks: what one task of lm-evaluation-harness said of one checkpoint, and the table that
puts checkpoints side by side.

Results are fractions, as the harness gives them; the table is in per cent. A figure that is not
there stays empty: nothing is carried over, averaged around or assumed. The processes behind the
figures are in `benchmarks`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p48ray.checkpoint.index import CONFIG_FILE, INDEX_FILE
from p48ray.config.benchmarks import (
    ROLES,
    SHOWN_KEYS,
    BenchmarksConfig,
    BenchmarkTask,
    ComparedCheckpoint,
    Role,
)
from p48ray.config.yaml_text import parse_yaml
from p48ray.errors import ConfigError, ObjectMissingError, StageFailedError
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import MANIFEST_FILE
from p48ray.run.records import Record, canonical_json
from p48ray.store.base import Store
from p48ray.store.view import SubStore

# of lm-evaluation-harness; pyproject.toml and the constraints pin the same. Tasks change between
# versions.
HARNESS_VERSION = "0.4.13"

Percent = Annotated[float, Field(ge=0, le=100)]


class BenchmarkResult(Record):
    """benchmarks/<digest>/result.json. `value`, `stderr`: fractions; `server`: name and version, as
    it says itself."""

    schema_version: Literal[1] = 1
    identity: str
    task: str
    shots: int
    metric: str
    filter: str
    limit: int | None
    max_length: int
    value: float = Field(ge=0, le=1)
    stderr: float | None
    num_samples: int
    task_version: str
    harness: str
    server: str


class BenchmarkColumn(Record):
    """One checkpoint of the table.

    `source`: where figures were published, of those that were not measured here. `checkpoint`: as
    the configuration names it. `stderr`: in per cent, as values.
    """

    role: Role
    title: str
    source: str | None = None
    checkpoint: str | None = None
    identity: str | None = None
    harness: str | None = None
    servers: tuple[str, ...] = ()
    values: dict[str, Percent]
    stderr: dict[str, float] = Field(default_factory=dict)


class BenchmarkTable(Record):
    """benchmarks/table.json: the rows and the three columns; one without figures is empty."""

    schema_version: Literal[1] = 1
    tasks: tuple[BenchmarkTask, ...]
    columns: tuple[BenchmarkColumn, ...]
    limit: int | None = None
    max_length: int | None = None

    def column(self, role: Role) -> BenchmarkColumn | None:
        return next((c for c in self.columns if c.role == role), None)

    def value(self, role: Role, task: str) -> float | None:
        column = self.column(role)
        return None if column is None else column.values.get(task)

    @property
    def averaged(self) -> tuple[str, ...]:
        """The tasks that every column with any figure has: only over them are averages
        comparable."""
        present = [c.values for c in self.columns if c.values]
        return tuple(
            t.task for t in self.tasks if present and all(t.task in values for values in present)
        )

    def average(self, role: Role) -> float | None:
        column = self.column(role)
        return (
            fmean(column.values[t] for t in self.averaged)
            if column and column.values and self.averaged
            else None
        )


class TableRow(BaseModel):
    """A task, or the average: per cent, `delta` in points, `recovery` in per cent of the base; None
    where a figure is missing."""

    model_config = ConfigDict(frozen=True)
    task: str | None
    label: str
    setting: str
    base: float | None
    baseline: float | None
    ours: float | None

    @property
    def delta(self) -> float | None:
        return None if self.base is None or self.ours is None else self.ours - self.base

    @property
    def recovery(self) -> float | None:
        return None if not self.base or self.ours is None else 100 * self.ours / self.base


def table_rows(table: BenchmarkTable) -> list[TableRow]:
    """Every task, then the average, which says over how many tasks it is."""
    rows = []
    for t in table.tasks:
        counted = "" if t.filter == "none" else f" ({t.filter})"
        values = {role: table.value(role, t.task) for role in ROLES}
        rows.append(
            TableRow(
                task=t.task, label=t.label, setting=f"{t.shots}-shot {t.metric}{counted}", **values
            )
        )
    means = {role: table.average(role) for role in ROLES}
    rows.append(
        TableRow(
            task=None,
            label="average",
            setting=f"of {len(table.averaged)} of {len(table.tasks)} tasks",
            **means,
        )
    )
    return rows


def table_notes(table: BenchmarkTable) -> list[str]:
    """With what every column was measured, or where its figures come from. Plain text, a sentence
    each."""
    notes = []
    for c in table.columns:
        title = c.title[:1].upper() + c.title[1:]
        if c.source is not None:
            notes.append(f"{title}: published figures, not measured here: {c.source}.")
        elif c.values:
            notes.append(
                f"{title}: lm-evaluation-harness {c.harness} against {', '.join(c.servers)},"
                f" checkpoint {(c.identity or '')[:12]}."
            )
        else:
            notes.append(f"{title}: not measured.")
    if table.limit is not None:
        notes.append(f"A trial: at most {table.limit:,} documents a task.")
    return notes


def identify(store: Store) -> str:
    """SHA-256 that stands for all bytes of a checkpoint: of config.json, and of p48ray.json, which
    has the digests of all else, or of the index.

    config.json counts, because both storages of one checkpoint have the same p48ray.json, and
    servers quantize their activations in other groups.
    Raises: ConfigError where there is no checkpoint.
    """
    try:
        config = store.get(CONFIG_FILE)
        digests = store.get(MANIFEST_FILE if store.head(MANIFEST_FILE) else INDEX_FILE)
    except ObjectMissingError as error:
        raise ConfigError(
            f"{store.uri}: expected a checkpoint: {CONFIG_FILE}, and {MANIFEST_FILE} or"
            f" {INDEX_FILE}; {error}"
        ) from None
    return hashlib.sha256(config + digests).hexdigest()


def result_digest(identity: str, task: BenchmarkTask, config: BenchmarksConfig) -> str:
    """Identity of a result: the checkpoint, what is asked and how it is counted. A task's
    definition counts by the harness's version alone."""
    facts = {
        "checkpoint": identity,
        **task.model_dump(mode="json", exclude=SHOWN_KEYS),
        "limit": config.limit,
        "max_length": config.max_length,
        "harness": HARNESS_VERSION,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def read_harness(
    output: Mapping[str, Any],
    identity: str,
    task: BenchmarkTask,
    config: BenchmarksConfig,
    server: str,
) -> BenchmarkResult:
    """The figure of a task in the harness's own results.

    Args:
        output: what the harness returned for this task.
        identity: of the checkpoint (see identify).
        task: as it was asked for.
        config: with the limits that it was measured under.
        server: what answered, as the table is to name it.
    Raises: StageFailedError where it says something else than was asked; ConfigError for a metric
        or a filter that the task has not.
    """
    found = output.get("results", {}).get(task.task)
    if not isinstance(found, dict):
        raise StageFailedError(
            f"{task.task}: expected it among the harness's results, found"
            f" {sorted(output.get('results', {}))}"
        )
    key = f"{task.metric},{task.filter}"
    if key not in found:
        known = sorted(k for k in found if "," in k and "stderr" not in k)
        raise ConfigError(
            f"benchmarks.tasks: {task.task}: expected one of its metrics and filters {known}, found"
            f" {key!r}"
        )
    parts = tasks_of_group(task.task, output.get("group_subtasks", {}))
    shots = {output.get("n-shot", {}).get(part) for part in parts}
    if shots != {task.shots}:
        raise StageFailedError(
            f"{task.task}: expected {task.shots} shots in every part, the harness counted"
            f" {sorted(map(str, shots))}"
        )
    if (version := output.get("lm_eval_version")) != HARNESS_VERSION:
        raise StageFailedError(
            f"{task.task}: expected results of lm-evaluation-harness {HARNESS_VERSION}, found"
            f" {version}"
        )
    stderr = found.get(f"{task.metric}_stderr,{task.filter}")
    return BenchmarkResult(
        identity=identity,
        **task.model_dump(exclude=SHOWN_KEYS),
        limit=config.limit,
        max_length=config.max_length,
        value=found[key],
        stderr=stderr if isinstance(stderr, float) else None,  # 'N/A' for some
        num_samples=sum(output["n-samples"][part]["effective"] for part in parts),
        task_version=str(output.get("versions", {}).get(task.task)),
        harness=HARNESS_VERSION,
        server=server,
    )


def tasks_of_group(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, through groups of groups; a task itself."""
    return (
        [leaf for part in groups[task] for leaf in tasks_of_group(part, groups)]
        if groups.get(task)
        else [task]
    )


class PublishedFigures(BaseModel):
    """A file with what others have measured. `figures`: task -> per cent."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str = Field(min_length=1)
    figures: dict[str, Percent] = Field(min_length=1)


def read_figures(path: str, tasks: Sequence[BenchmarkTask], key: str) -> PublishedFigures:
    """Raises: ConfigError naming the file and its key, for what is no such file, for tasks that are
    no
    rows, and for fractions in place of per cent."""
    try:
        found = PublishedFigures.model_validate(
            parse_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
        )
    except OSError as error:
        raise ConfigError(f"{key}: {path}: can not be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        raise ConfigError(
            f"{key}: {path}: {where}: {first['msg']}, found {first['input']!r:.80}"
        ) from None
    except ValueError as error:  # of its text, or of its bytes
        raise ConfigError(f"{key}: {path}: {error}") from None
    names = [t.task for t in tasks]
    if strange := sorted(set(found.figures) - set(names)):
        raise ConfigError(
            f"{key}: {path}: figures: expected tasks of the table {names}, found {strange}"
        )
    if max(found.figures.values()) <= 1:
        raise ConfigError(
            f"{key}: {path}: figures: expected per cent, found none above 1: {found.figures}"
        )
    return found


DEFAULT_TITLES: dict[Role, str] = {
    "base": "base",
    "baseline": "one-shot baseline",
    "ours": "this checkpoint",
}


def build_table(
    config: BenchmarksConfig, store: Store, identities: Mapping[Role, str]
) -> BenchmarkTable:
    """What the run root has of the configured rows and columns. A result that is not there leaves
    its place empty.

    Args:
        identities: of the columns with a checkpoint, as far as they are known.
    """
    held = {info.key for info in store.list(run_root.BENCHMARKS)}
    columns = []
    for role in ROLES:
        # one that is not named has its place all the same
        column = config.columns().get(role, ComparedCheckpoint())
        title = column.title or DEFAULT_TITLES[role]
        if column.figures:
            published = read_figures(column.figures, config.tasks, f"benchmarks.{role}.figures")
            columns.append(
                BenchmarkColumn(
                    role=role, title=title, source=published.source, values=published.figures
                )
            )
            continue
        identity = identities.get(role)
        keys = (
            [run_root.benchmark_result(result_digest(identity, t, config)) for t in config.tasks]
            if identity
            else []
        )
        results = BenchmarkResult.load_all(store, [key for key in keys if key in held])
        columns.append(
            BenchmarkColumn(
                role=role,
                title=title,
                checkpoint=column.checkpoint,
                identity=identity,
                harness=HARNESS_VERSION if results else None,
                servers=tuple(sorted({r.server for r in results})),
                values={r.task: 100 * r.value for r in results},
                stderr={r.task: 100 * r.stderr for r in results if r.stderr is not None},
            )
        )
    return BenchmarkTable(
        tasks=config.tasks, columns=tuple(columns), limit=config.limit, max_length=config.max_length
    )


def read_table(store: Store) -> BenchmarkTable | None:
    """The table that a run root holds, if it is about the checkpoint that is there now."""
    if store.head(run_root.BENCHMARK_TABLE) is None:
        return None
    table = BenchmarkTable.load(store, run_root.BENCHMARK_TABLE)
    return table if is_about(table, store) else None


def is_about(table: BenchmarkTable, store: Store) -> bool:
    """Whether the table's own column is the run root's checkpoint as it is now, and not a copy in
    another storage or one that was made anew."""
    ours = table.column("ours")
    try:
        return ours is not None and ours.identity == identify(SubStore(store, run_root.CHECKPOINT))
    except ConfigError:
        return False
