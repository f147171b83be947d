"""Prepare: open the source, check every input, plan. Nothing is written, so that a mistake leaves
nothing behind."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import ModelLayout
from p48ray.config import EvaluationConfig, RunConfig, RunSettings
from p48ray.errors import ConfigError, P48Error
from p48ray.model.source_check import check_source
from p48ray.run import run_root
from p48ray.run.output_layout import OutputShard, plan_output
from p48ray.run.plan import MirroredFile, RunPlan, make_plan
from p48ray.run.scratch import with_scratch
from p48ray.stages.evaluate import OTHER_DOMAIN, check_length
from p48ray.stages.mirror import files_to_mirror, mirror_state, mirrored
from p48ray.stages.revisions import hub_places, read_held_plan, resolve
from p48ray.store.base import Store
from p48ray.store.memory import MemoryStore
from p48ray.store.open import is_within, mirror_source, open_store, scheme_of, writable_examples
from p48ray.store.view import SubStore
from p48ray.texts.documents import digest_documents, look_at_texts
from p48ray.texts.sequences import digest_tokenizer, shares
from p48ray.unit.context import StageContext

DRY_RUN_STORE = "dry-run"
# set by Ray's job supervisor for the entrypoint it runs
RAY_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run whose every input has been checked, before anything is written. `source`: as it can be
    read now, a hf:// source from the Hub."""

    plan: RunPlan
    store: Store
    source: CheckpointIndex
    layout: ModelLayout
    shards: tuple[OutputShard, ...]

    @property
    def context(self) -> StageContext:
        """For stages after the mirror: a hf:// source is read from there."""
        source = mirrored(self.source, self.store) if self.plan.source.mirror else self.source
        return StageContext(
            plan=self.plan,
            store=self.store,
            source=source,
            layout=self.layout,
            device=torch.device("cpu"),
        )


def prepare(config: RunConfig, is_dry: bool = False) -> Prepared:
    """Open the source, check it, and plan. Nothing is written.

    Args:
        is_dry: texts and run root may lie where this machine can not reach them: nobody else is
            asked for them. Those of this machine are looked at, and stay as they are.
    Raises: UserError of some kind for whatever the user must mend.
    """
    config = absolute(config)
    store = open_place(config.run)
    check_apart(config, store)
    check_scratch(config, store, is_dry)
    if is_dry:
        store = MemoryStore(DRY_RUN_STORE)
        look_at_texts(config.calibration.documents, "calibration.documents")
        if config.evaluation is not None:
            look_at_texts(config.evaluation.documents, "evaluation.documents")
    held = read_held_plan(store) if hub_places(config) and not is_dry else None
    config, commits = resolve(config, held.revisions if held else {}, is_dry)
    source, mirror = open_planned_source(config, store, held)
    layout = describe_model(source)
    check_source(source, layout)
    documents = (
        digest_documents(config.calibration.documents, "calibration.documents")
        if not is_dry
        else "not read"
    )
    plan = make_plan(config, source, layout, documents, digest_tokenizer(source), mirror, commits)
    if config.evaluation is not None:
        check_length(plan, config.evaluation, layout.text_config.get("max_position_embeddings"))
        check_domains(config.evaluation)
    output = config.output
    shards = (
        ()
        if plan.is_pilot
        else plan_output(plan.units, output.max_shard_size, source, layout, output.storage)
    )
    if not is_dry:
        store = with_scratch(plan, store)
    return Prepared(plan=plan, store=store, source=source, layout=layout, shards=shards)


def check_domains(settings: EvaluationConfig) -> None:
    """Raises: ConfigError for a domain of which the mix has no sequence, so no figure either."""
    documents = settings.documents
    if not any(d.name for d in documents):
        return
    counts: Counter[str] = Counter()
    for document, count in zip(
        documents, shares([d.weight for d in documents], settings.num_sequences), strict=True
    ):
        counts[document.name or OTHER_DOMAIN] += count
    if empty := [name for name, count in counts.items() if not count]:
        raise ConfigError(
            f"evaluation.num_sequences: expected a sequence of every domain, found"
            f" {settings.num_sequences} with none of {', '.join(empty)}: by the weights of"
            " evaluation.documents they are too few"
        )


def open_place(run: RunSettings) -> Store:
    """The run root, which nothing has touched yet.

    Raises: ConfigError for what can not be one, as far as this machine knows.
    """
    try:
        store = open_store(run.root, run.endpoint_url)
    except P48Error as error:
        raise ConfigError(f"run.root: {error}") from error
    if not scheme_of(run.root).is_local:
        return store
    check_writable("run.root", Path(store.uri))
    return store


def check_writable(key: str, path: Path) -> None:
    """A folder of this machine that is there, or can be made.

    Args: key: that names it.
    Raises: ConfigError for one that can not be written, as far as permissions tell.
    """
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise ConfigError(f"{key}: {path}: can not be used: {error.strerror}") from error
    if not nearest.is_dir():
        raise ConfigError(f"{key}: {path}: expected a folder, found that {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {path}: expected a folder to write to, found that {nearest} may not be written"
        )


def check_run_place(path: Path, config: RunConfig) -> None:
    """The run root is something that can be written to; and under a Ray job nothing relative, which
    would land in Ray's temporary copy of the working directory, and be lost.

    Args: path: of the configuration, for messages.
    Raises: ConfigError.
    """
    if not scheme_of(config.run.root).is_writable:
        raise ConfigError(
            f"{path}: run.root: expected {writable_examples()}, found {config.run.root!r}"
        )
    is_relative = scheme_of(config.run.root).is_path and not os.path.isabs(config.run.root)
    if RAY_JOB_MARK in os.environ and is_relative:
        raise ConfigError(
            "run.root: expected an absolute path under `ray job submit`, found"
            f" {config.run.root!r}: it would lie in Ray's temporary copy of the working directory;"
            " pass --run-root with an absolute path"
        )


def check_scratch(config: RunConfig, store: Store, is_dry: bool) -> None:
    """Scratch is a folder, and apart from what is kept and from what is read.

    Args:
        config: with run.scratch or without.
        store: the run root.
        is_dry: another machine may have the folder.
    Raises: ConfigError.
    """
    place = config.run.scratch
    if place is None:
        return
    if not scheme_of(place).is_local:
        raise ConfigError(
            f"run.scratch: expected a folder, of a node or of a file system that all nodes share,"
            f" found {place!r}"
        )
    folder = open_store(place)
    kept = [("run.root", store)]
    if not scheme_of(config.source.checkpoint).mirror:
        source = open_store(config.source.checkpoint, config.source.endpoint_url)
        kept.append(("source.checkpoint", source))
    for key, other in kept:
        if is_within(folder, other):
            raise ConfigError(
                f"run.scratch: {folder.uri}: expected a place apart from {key} ({other.uri}), found"
                " one in it"
            )
    if not is_dry or Path(folder.uri).exists():
        check_writable("run.scratch", Path(folder.uri))


def check_apart(config: RunConfig, store: Store) -> None:
    """A run root in its source's folder would be carried over by the next run of that source; a
    source where a run writes would not stay what it is.

    Raises: ConfigError for either.
    """
    place = config.source.checkpoint
    if scheme_of(place).mirror:
        return
    source = open_store(place, config.source.endpoint_url)
    if is_within(store, source):
        found = "the same" if is_within(source, store) else "one inside it"
    elif is_within(source, store) and any(
        is_within(source, open_store(f"{store.uri}/{prefix}".rstrip("/"), config.run.endpoint_url))
        for prefix in run_root.PREFIXES
    ):
        found = "that the source lies where the run writes"
    else:
        return
    raise ConfigError(
        f"run.root: {store.uri}: expected a place apart from source.checkpoint ({source.uri}),"
        f" found {found}; take another --run-root"
    )


def open_planned_source(
    config: RunConfig, store: Store, held: RunPlan | None
) -> tuple[CheckpointIndex, tuple[MirroredFile, ...]]:
    """The source, and what is to be mirrored of it. A mirror that is complete is read instead of
    the Hub.

    Raises: ConfigError for a hf:// source that is no model's whole repository; SourceError for one
        that is not sound.
    """
    place = config.source.checkpoint
    if (
        held is not None
        and held.source.mirror
        and held.config.source.checkpoint == place
        and mirror_state(held, store).is_complete
    ):
        return open_checkpoint(SubStore(store, run_root.SOURCE)), held.source.mirror
    try:
        opened = mirror_source(place)
    except ConfigError as error:
        raise ConfigError(f"source.checkpoint: {error}") from error
    if opened is None:
        return open_checkpoint(open_store(place, config.source.endpoint_url)), ()
    index = open_checkpoint(opened)
    return index, files_to_mirror(index, opened)


def absolute(config: RunConfig) -> RunConfig:
    """Local paths as every process will see them, whatever its working directory."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if scheme_of(path).is_path else path

    source = config.source.model_copy(update={"checkpoint": full(config.source.checkpoint)})
    scratch = None if config.run.scratch is None else full(config.run.scratch)
    places = {"root": full(config.run.root), "scratch": scratch}
    return config.model_copy(update={"source": source, "run": config.run.model_copy(update=places)})
