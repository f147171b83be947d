"""What of a run lies on its nodes' own disks, and what is reached over the network."""

from p48ray.config import RunSettings
from p48ray.run.plan import RunPlan
from p48ray.store.open import scheme_of


def is_near(place: str, is_shared: bool) -> bool:
    """A local folder that is not declared the same on every node (StageContext.store_is_near)."""
    return not is_shared and scheme_of(place).is_local


def are_streams_near(run: RunSettings) -> bool:
    """What streams leave lies in files that are mapped (StageContext.near_path): in run.scratch, or
    in a near run root."""
    return run.scratch is not None or is_near(run.root, run.root_is_shared)


def is_source_near(plan: RunPlan) -> bool:
    """What workers read of the source: a mirror lies in the run root."""
    run = plan.config.run
    if plan.source.mirror:
        return is_near(run.root, run.root_is_shared)
    return is_near(plan.config.source.checkpoint, False)
