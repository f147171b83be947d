"""Revisions: every hf:// place of a configuration at one commit, looked up once in the life of a
run.

A branch may move between a run and its resume. The plan in the run root says which commit each
place stood at when it was first planned, and the same words mean the same commit for as long as
that plan is there.
"""

from collections.abc import Callable, Mapping

from p48ray.config import RunConfig
from p48ray.config.documents import DocumentSource
from p48ray.run import run_root
from p48ray.run.changing_hands import read_plan
from p48ray.run.plan import RunPlan
from p48ray.store.base import Store
from p48ray.store.open import scheme_of


def hub_places(config: RunConfig) -> list[str]:
    """Every hf:// text of a configuration, in order, each once."""
    texts = (
        *config.calibration.documents,
        *(config.evaluation.documents if config.evaluation else ()),
    )
    places = [config.source.checkpoint, *(d.path for d in texts)]
    return list(dict.fromkeys(place for place in places if scheme_of(place).revisions))


def read_held_plan(store: Store) -> RunPlan | None:
    """The plan in a run root, if there is one."""
    return read_plan(store) if store.head(run_root.PLAN) is not None else None


def resolve(
    config: RunConfig, known: Mapping[str, str], is_dry: bool
) -> tuple[RunConfig, dict[str, str]]:
    """The configuration with a commit in each hf:// place, and which.

    Args:
        known: commit by place; these are not asked for again.
        is_dry: texts are left as they are, because a dry run does not touch them.
    Raises: ConfigError for a repository or revision that is not there or may not be read.
    """
    source = config.source.checkpoint
    asked = [place for place in hub_places(config) if not is_dry or place == source]
    kinds = {place: kind for place in asked if (kind := scheme_of(place).revisions)}
    commits = {place: known.get(place) or kind.commit(place) for place, kind in kinds.items()}

    def pinned(place: str) -> str:
        return kinds[place].at(place, commits[place]) if place in kinds else place

    return with_places(config, pinned), commits


def with_places(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """The configuration with every place of source and texts changed."""

    def texts(documents: tuple[DocumentSource, ...]) -> tuple[DocumentSource, ...]:
        return tuple(d.model_copy(update={"path": change(d.path)}) for d in documents)

    changed = {
        "source": config.source.model_copy(update={"checkpoint": change(config.source.checkpoint)}),
        "calibration": config.calibration.model_copy(
            update={"documents": texts(config.calibration.documents)}
        ),
    }
    if config.evaluation is not None:
        changed["evaluation"] = config.evaluation.model_copy(
            update={"documents": texts(config.evaluation.documents)}
        )
    return config.model_copy(update=changed)
