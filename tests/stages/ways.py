"""The backward pass as a runner hands it out, in this process."""

from collections.abc import Sequence

from p48ray.run.manifest import GradientPart
from p48ray.stages.gradients import gradient_parts
from p48ray.unit.context import StageContext


def go_back(context: StageContext, parts: Sequence[int]) -> list[GradientPart]:
    """All segments, top first. Returns the manifests of gradients."""
    return [
        found
        for segment in context.plan.passes.segments
        for found in gradient_parts(context, (segment.start, parts))
        if isinstance(found, GradientPart)
    ]
