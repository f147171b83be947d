"""The evaluation job: whatever tasks the run root lacks are asked of a server, then the table, the
card and the report are written anew."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from p48ray.benchmarks.harness import Harness, check_harness
from p48ray.benchmarks.server_process import (
    ServedModel,
    model_named,
    served_models,
    server_version,
)
from p48ray.config import RunConfig
from p48ray.config.benchmarks import BenchmarksConfig, BenchmarkTask, ComparedCheckpoint, Role
from p48ray.errors import ConfigError, ObjectMissingError, P48Error, StageFailedError, UserError
from p48ray.report.report import Report
from p48ray.report.serving_card import serving_flags
from p48ray.report.work import duration
from p48ray.run import run_root
from p48ray.run.benchmark_results import (
    DEFAULT_TITLES,
    BenchmarkTable,
    build_table,
    identify,
    is_about,
    read_figures,
    read_harness,
    result_digest,
)
from p48ray.run.changing_hands import read_plan
from p48ray.run.checked import load_unit_manifests
from p48ray.run.plan import RunPlan
from p48ray.run.records import canonical_json
from p48ray.runner.pipeline import write_report
from p48ray.stages.prepare import absolute
from p48ray.stages.workplace import open_context
from p48ray.store.base import Store
from p48ray.store.open import open_store, scheme_of

log = logging.getLogger("p48ray.progress")

StartServer = Callable[[Sequence[str]], AbstractContextManager[str]]
"""From a command to a context whose value is the server's base URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A column with a checkpoint. `place`: as servers and tokenizers take it, a folder or
    owner/name; `revision`: of the latter."""

    role: Role
    column: ComparedCheckpoint
    identity: str
    place: str
    revision: str | None
    missing: tuple[BenchmarkTask, ...]

    @property
    def title(self) -> str:
        return self.column.title or DEFAULT_TITLES[self.role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A finished run whose benchmarks are asked for; every input has been checked.

    `plan`: the run root's, with the places of this configuration. `chosen`: what is to be measured
    now. `identities`: of all columns with a checkpoint.
    """

    config: RunConfig
    benchmarks: BenchmarksConfig
    plan: RunPlan
    store: Store
    report: Report
    chosen: tuple[Measured, ...]
    identities: Mapping[Role, str]

    def server_command(self, column: Measured) -> list[str]:
        """As it is started, but for --host and --port."""
        server, family = self.benchmarks.server, self.plan.source.family
        flags = column.column.flags
        if flags is None:
            flags = tuple(
                w
                for f in serving_flags(family, server.gpus or 1, column.role != "base")
                for w in f.split(" ")
            )
        at = ("--revision", column.revision) if column.revision else ()
        return [*server.command, column.place, *at, *flags]


def prepare_evaluation(config: RunConfig, only: Role | None, url: str | None) -> Evaluation:
    """Open everything and check it; nothing is written.

    Args:
        only: the one column to measure.
        url: of a server that runs already; it serves one checkpoint, ours unless another is named.
    Raises: UserError of some kind for whatever the user must mend.
    """
    config = absolute(config)
    benchmarks = config.benchmarks or BenchmarksConfig()
    store = open_store(config.run.root, config.run.endpoint_url)
    plan, report = read_run(config, store)
    wanted: Role | None = only or ("ours" if url else None)
    held, chosen = {info.key for info in store.list(run_root.BENCHMARKS)}, []
    known = known_identities(store, benchmarks) if run_root.BENCHMARK_TABLE in held else {}
    for role, column in benchmarks.columns().items():
        if column.figures:
            read_figures(column.figures, benchmarks.tasks, f"benchmarks.{role}.figures")
            continue
        opened = open_store(
            column.checkpoint or f"{config.run.root}/{run_root.CHECKPOINT}".rstrip("/"),
            config.run.endpoint_url,
        )
        try:
            known[role] = identify(opened)
        except P48Error:
            if wanted in (None, role):
                raise
            # it need not be in reach to be shown: where it was measured before, the table has its
            # identity
            continue
        if wanted in (None, role):
            missing = [
                t
                for t in benchmarks.tasks
                if run_root.benchmark_result(result_digest(known[role], t, benchmarks)) not in held
            ]
            place, revision = served_place(opened)
            chosen.append(
                Measured(
                    role=role,
                    column=column,
                    identity=known[role],
                    place=place,
                    revision=revision,
                    missing=tuple(missing),
                )
            )
    if not chosen:
        raise ConfigError(
            f"--checkpoint {wanted}: expected a checkpoint under benchmarks.{wanted} of the"
            " configuration, found none"
        )
    check_places(chosen, benchmarks, url)
    return Evaluation(
        config=config,
        benchmarks=benchmarks,
        plan=plan,
        store=store,
        report=report,
        chosen=tuple(chosen),
        identities=known,
    )


def known_identities(store: Store, benchmarks: BenchmarksConfig) -> dict[Role, str]:
    """Of the columns that the run root's table has and the configuration still means."""
    table, now = BenchmarkTable.load(store, run_root.BENCHMARK_TABLE), benchmarks.columns()
    return {
        c.role: c.identity
        for c in table.columns
        if c.identity and c.role in now and now[c.role].checkpoint == c.checkpoint
    }


def read_run(config: RunConfig, store: Store) -> tuple[RunPlan, Report]:
    """The finished run that a configuration is about, to be shown with this configuration's
    evaluation and price.

    Raises: ConfigError where there is none, or another one.
    """
    try:
        plan, report = read_plan(store), Report.load(store, run_root.REPORT)
    except ObjectMissingError as error:
        raise ConfigError(
            f"--run-root: expected a finished run in {store.uri}: {error}; run jobs/compress.py to"
            " its end first"
        ) from None
    if plan.is_pilot:
        raise ConfigError(
            f"--run-root: expected a whole run in {store.uri}, found a pilot of {len(plan.layers)}"
            " layers, which has no checkpoint"
        )
    if plan.config.name != config.name:
        raise ConfigError(
            f"--run-root: expected the run {config.name!r} of --config in {store.uri}, found"
            f" {plan.config.name!r}"
        )
    now: dict[str, object] = {"evaluation": config.evaluation, "run": config.run}
    # a hf:// source is read from the run root, and shown with the commit that was planned
    if not plan.source.mirror:
        now["source"] = config.source
    shown = plan.config.model_copy(update=now)
    return plan.model_copy(update={"config": shown}), report


def served_place(store: Store) -> tuple[str, str | None]:
    """What a server is given for a checkpoint: (folder, None), (owner/name, revision), or the uri
    of a bucket."""
    served = scheme_of(store.uri).served
    return served(store.uri) if served else (store.uri, None)


def check_places(chosen: Sequence[Measured], benchmarks: BenchmarksConfig, url: str | None) -> None:
    """Raises: ConfigError for a checkpoint in a bucket that is to be served from here, or whose
    tokenizer the harness can not find."""
    for column in chosen:
        if scheme_of(column.place).served is None and column.missing:
            if url is None:
                raise ConfigError(
                    f"benchmarks.{column.role}.checkpoint: {column.place}: expected a folder or"
                    " hf://owner/name@revision that a server can read; copy it to a folder and"
                    " name that, or serve it yourself and pass --server URL"
                )
            if benchmarks.tokenizer is None:
                raise ConfigError(
                    "benchmarks.tokenizer: expected a folder or owner/name for the harness, since"
                    f" {column.place} is a bucket; found null"
                )


def run_evaluation(
    evaluation: Evaluation, url: str | None, start_server: StartServer
) -> BenchmarkTable:
    """Measure what is missing, and write table, card, page and report. What fails is set aside
    until all else is done.

    Args:
        url: of a server that runs already.
        start_server: for every column with something missing, where there is no such server.
    Raises: UserError at once; StageFailedError at the end, with all that failed. What was measured
        stays, and the same call goes on from there.
    """
    failed: dict[str, P48Error] = {}
    if any(c.missing for c in evaluation.chosen):
        check_harness(evaluation.benchmarks)
    for column in evaluation.chosen:
        num_tasks = len(evaluation.benchmarks.tasks)
        log.info(
            "evaluate  %s: %d of %d tasks done already",
            column.title,
            num_tasks - len(column.missing),
            num_tasks,
        )
        if not column.missing:
            continue
        try:
            with nullcontext(url) if url else start_server(evaluation.server_command(column)) as at:
                failed |= measure_column(evaluation, column, at.rstrip("/"))
        except UserError:
            raise
        except P48Error as error:
            failed[column.title] = error
    table = build_table(evaluation.benchmarks, evaluation.store, evaluation.identities)
    publish_table(evaluation, table)
    if failed:
        lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise StageFailedError(
            f"evaluate: {len(failed)} failures; run the same command again to go on\n{lines}"
        )
    return table


def measure_column(evaluation: Evaluation, column: Measured, url: str) -> dict[str, P48Error]:
    """Every missing task of a checkpoint, one after the other. Returns what failed, by name."""
    model = find_model(served_models(url), evaluation.benchmarks, column, url)
    server = server_version(url, model)
    harness = Harness(
        evaluation.benchmarks,
        url,
        model.id,
        evaluation.benchmarks.tokenizer or column.place,
        None if evaluation.benchmarks.tokenizer else column.revision,
        evaluation.config.source.trust_remote_code,
    )
    failed: dict[str, P48Error] = {}
    for task in column.missing:
        start = time.monotonic()
        log.info("evaluate  %s: %s, %d-shot, on %s", column.title, task.label, task.shots, server)
        try:
            output = harness.run(task)
            result = read_harness(output, column.identity, task, evaluation.benchmarks, server)
        except UserError:
            raise
        except P48Error as error:
            log.error(
                "evaluate  %s: %s failed: %s", column.title, task.label, str(error).splitlines()[0]
            )
            failed[f"{column.title}: {task.label}"] = error
            continue
        digest = result_digest(column.identity, task, evaluation.benchmarks)
        evaluation.store.put(run_root.harness_output(digest), canonical_json(output))
        evaluation.store.put_if_absent(run_root.benchmark_result(digest), result.to_json())
        log.info(
            "evaluate  %s: %s %s %.2f %% in %s",
            column.title,
            task.label,
            task.metric,
            100 * result.value,
            duration(time.monotonic() - start),
        )
    return failed


def find_model(
    served: Sequence[ServedModel], config: BenchmarksConfig, column: Measured, url: str
) -> ServedModel:
    """The served model that is the checkpoint, by its name or by the place that it was loaded from.

    Args:
        served: every model of the server.
        config: the benchmarks' settings.
        column: of the checkpoint that is measured.
        url: of the server, for messages.
    Raises: ConfigError when the server has another model, or takes shorter requests than the
        harness would send.
    """
    wanted = column.column.served_name or column.place
    model = model_named(served, {wanted})
    if model is None:
        found = ", ".join(f"{m.id!r} from {m.root!r}" for m in served) or "none"
        raise ConfigError(
            f"{url}: expected a server of {wanted!r}, it serves {found}; name the checkpoint with"
            f" --checkpoint, or give the server's id for it as benchmarks.{column.role}.served_name"
        )
    if model.max_length is not None and model.max_length < config.max_length:
        raise ConfigError(
            f"benchmarks.max_length: expected at most the server's {model.max_length} tokens, found"
            f" {config.max_length}"
        )
    return model


def publish_table(evaluation: Evaluation, table: BenchmarkTable) -> None:
    """Into the run root, and into what people read; but for figures of another checkpoint than the
    run root's, which are kept and not shown there."""
    if not is_about(table, evaluation.store):
        log.warning(
            "evaluate  benchmarks.ours.checkpoint is not what lies in %s/checkpoint: its report and"
            " card stay as they are",
            evaluation.store.uri,
        )
        return
    evaluation.store.put(run_root.BENCHMARK_TABLE, table.to_json())
    context = open_context(evaluation.plan, evaluation.store)
    units = load_unit_manifests(context.plan, context.store)
    write_report(context, evaluation.report.model_copy(update={"benchmarks": table}), units)
