"""Whose run root it is: plan.json against the plan that a driver has, and how it changes hands.

A run root belongs to the plan that lies in it. A driver whose plan has the same units (RunPlan's
units_digest) may put its own in that one's place as long as there is no finished checkpoint: so a
full run goes on with what its pilot made. So may one whose source was mended, where the held plan's
was refused before anything was made of it (the stage `scan`). The driver that was there before
notices at its next step that is about more than units, and ends.
"""

from collections.abc import Collection, Iterator, Mapping

from pydantic import JsonValue

from p48ray import __version__
from p48ray.checkpoint.index import INDEX_FILE
from p48ray.errors import ConfigError, PlanMismatchError, ShardCorruptError
from p48ray.run import run_root
from p48ray.run.cleanup import delete_all
from p48ray.run.manifest import ScanManifest
from p48ray.run.needs import NEEDED_PREFIXES
from p48ray.run.output_layout import shard_count
from p48ray.run.plan import FORMAT_VERSION, RunPlan, digest_facts, units_facts
from p48ray.run.records import load_readable, read_json
from p48ray.store.base import Store

NOT_NOTED = "0.1.0"
"""The version of p48ray that wrote a plan that does not say which."""


def check_plan(plan: RunPlan, store: Store) -> RunPlan | None:
    """Compare with the plan that the run root holds.

    Returns: the held plan; None if there is none. It is this plan where the digests are equal; else
    it has the same units, or none because its source was refused, and `take_over` may replace it.
    Raises: PlanMismatchError naming the first setting that differs, and both values, when units
        differ, or when the checkpoint of another plan is finished there.
    """
    if store.head(run_root.PLAN) is None:
        return None
    held = read_plan(store)
    ours, theirs = units_facts(plan), units_facts(held)
    # the fingerprint does not cover the small files, which are mirrored and carried over too
    if plan.source.mirror and held.source.mirror:
        ours, theirs = (
            {"source.checkpoint": p.config.source.checkpoint, **facts}
            for p, facts in ((plan, ours), (held, theirs))
        )
    if held.units_digest != plan.units_digest or ours != theirs:
        if differing(ours, theirs) == ["source fingerprint"] and is_refused_source(held, store):
            return held
        raise mismatch(store, ours, theirs, "take the old setting back, or another --run-root")
    is_finished = store.head(run_root.checkpoint_file(INDEX_FILE)) is not None
    if held.digest != plan.digest and is_finished:
        raise mismatch(store, digest_facts(plan), digest_facts(held), FINISHED)
    return held


def is_refused_source(held: RunPlan, store: Store) -> bool:
    """Whether the source of a held plan was refused for values that are not finite, before anything
    was made of it: whoever mends the source runs the same command again."""
    if any(True for prefix in WORK for _ in store.list(prefix)):
        return False
    keys = [info.key for info in store.list(run_root.SCAN)]
    scans = load_readable(ScanManifest, store, keys).values()
    return any(s.refused and s.source_fingerprint == held.source.fingerprint for s in scans)


WORK = (*NEEDED_PREFIXES, run_root.CHECKPOINT, run_root.BASELINE)
"""Prefixes of what is worth keeping."""

FINISHED = (
    "its checkpoint is finished: take the old setting back, or another --run-root, or delete"
    " checkpoint/ to have another made of the same units (`p48ray convert` makes the other storage"
    " of a finished one)"
)


def mismatch(
    store: Store, ours: Mapping[str, JsonValue], theirs: Mapping[str, JsonValue], advice: str
) -> PlanMismatchError:
    """The error that names the first fact that differs.

    Args:
        store: the run root.
        ours: facts of this run.
        theirs: of the plan that the run root holds.
        advice: what to do.
    """
    names = differing(ours, theirs) or ["plan digest"]
    name = names[0]
    more = f" and {len(names) - 1} more differences" if len(names) > 1 else ""
    return PlanMismatchError(
        f"{store.uri}/{run_root.PLAN}: this run root belongs to another plan: {name}: expected"
        f" {ours.get(name)!r} (this run), found {theirs.get(name)!r}{more}; {advice}"
    )


def differing(ours: Mapping[str, JsonValue], theirs: Mapping[str, JsonValue]) -> list[str]:
    """Names of facts, in the order of ours."""
    return [name for name in ours if ours[name] != theirs.get(name)]


def read_plan(store: Store) -> RunPlan:
    """The plan that a run root holds.

    Raises: ConfigError where there is none; PlanMismatchError for one of another format version,
        with what resumes it, and for one that is no plan.
    """
    if store.head(run_root.PLAN) is None:
        raise ConfigError(f"{store.uri}: expected a run root with {run_root.PLAN}, found none")
    data, where = store.get(run_root.PLAN), f"{store.uri}/{run_root.PLAN}"
    try:
        found = read_json(data, where)
        version = found.get("format_version", FORMAT_VERSION)
        if version == FORMAT_VERSION:
            return RunPlan.from_json(data, where)
    except ShardCorruptError as error:
        raise PlanMismatchError(
            f"{error}; delete this object: the next run writes it again, and what was made under"
            " other settings is known by the digest that it carries"
        ) from None
    raise PlanMismatchError(
        f"{where}: format version: expected {FORMAT_VERSION} (p48ray {__version__}), found"
        f" {version!r}; p48ray {found.get('made_by') or NOT_NOTED} resumes it, or take another"
        " --run-root; a finished checkpoint/ in it still verifies, converts and publishes"
    )


def root_is_shared(store: Store) -> bool:
    """Whether every node sees a local run root (run.root_is_shared), of whatever version it is: to
    publish a finished checkpoint needs no more of its plan."""
    run = read_json(store.get(run_root.PLAN), f"{store.uri}/{run_root.PLAN}")["config"]["run"]
    return bool(run.get("root_is_shared", False))


def take_over(plan: RunPlan, store: Store) -> None:
    """Put this plan in the place of one with the same units: what it stitched and found out goes,
    the units stay.

    The new plan comes first, so that the driver of the old one finds it (check_still_ours) before
    what it made is gone.
    """
    store.put(run_root.PLAN, plan.to_json())
    for prefix in (run_root.VERIFICATION, run_root.CHECKPOINT, run_root.REPORT_FOLDER):
        delete_all(store, [info.key for info in store.list(prefix)])


def finish_take_over(plan: RunPlan, planned: Collection[str], store: Store) -> None:
    """Delete what a take-over owed that died once its plan was there: shards of a checkpoint that
    is cut otherwise, with their verdicts, and the report.

    Nothing goes under a name that no job writes, and nothing beside an index.

    Args:
        plan: that lies in the run root.
        planned: names of its output shards.
        store: the run root.
    """
    if store.head(run_root.checkpoint_file(INDEX_FILE)) is None:
        delete_all(store, list(leftovers(plan, planned, store)))


def leftovers(plan: RunPlan, planned: Collection[str], store: Store) -> Iterator[str]:
    """Keys of another plan's work among what a take-over deletes. Arguments as finish_take_over
    takes them."""
    for folder, key_of in (
        (run_root.CHECKPOINT, run_root.checkpoint_file),
        (run_root.VERIFICATION, run_root.shard_verdict),
    ):
        kept = {key_of(name) for name in planned}
        for info in store.list(folder):
            stem = info.key.rpartition("/")[2].rpartition(".")[0]
            name = f"{stem}.safetensors"
            if shard_count(name) and info.key == key_of(name) and info.key not in kept:
                yield info.key
    if store.head(run_root.REPORT) is not None:
        try:
            said = read_json(store.get(run_root.REPORT), f"{store.uri}/{run_root.REPORT}")
        except ShardCorruptError:
            said = {}  # nobody's: this run writes it again
        if said.get("plan_digest") != plan.digest:
            yield from (info.key for info in store.list(run_root.REPORT_FOLDER))


def is_still_ours(plan: RunPlan, store: Store) -> bool:
    """Whether no other plan has taken this one's place."""
    return store.head(run_root.PLAN) is None or read_plan(store).digest == plan.digest


def check_still_ours(plan: RunPlan, store: Store) -> None:
    """Raises: PlanMismatchError when another driver took the run root over."""
    if not is_still_ours(plan, store):
        facts = digest_facts(plan), digest_facts(read_plan(store))
        raise mismatch(store, *facts, TAKEN_OVER)


TAKEN_OVER = (
    "another driver took the run root over while this one worked, and goes on with the same units"
)
