"""The most that a run root holds at a time under run.keep (run.cleanup)."""

from collections.abc import Iterator

from p48ray.run.plan import RunPlan


def peak_stored_bytes(
    plan: RunPlan, boundary: int, seen: int, felt: int, units: int, checkpoint: int
) -> int:
    """The most that the run root holds at a time, the mirror apart, which stays.

    With keep: all the sum of everything. Otherwise the largest over all states that streams and
    units can be in together: so many layers streamed (from the top where there is a backward pass,
    else from the bottom), so many of them finished, whose tokens are gone, and units under way in
    as many more as there are workers that do not stream. Last, unit shards beside the checkpoint.

    Args:
        plan: of the run.
        boundary: bytes of all tokens' residual stream at one boundary.
        seen: bytes of all planned layers' activations and routing.
        felt: bytes of all planned layers' gradients; 0 without a backward pass.
        units: bytes of all unit shards; 0 for what streams hold alone.
        checkpoint: bytes of the output's shards.
    """
    if plan.config.run.keep == "all":
        passes = plan.passes
        boundaries = num_boundaries(plan) + passes.draws * len(passes.gradient_boundaries)
        return seen + felt + boundaries * boundary + units + checkpoint
    if plan.propagates:
        most = peak_layer_by_layer(plan, boundary, seen, felt, units)
    elif plan.uses_gradients:
        most = peak_by_segments(plan, boundary, seen + felt, units)
    else:
        most = peak_going_up(plan, boundary, seen, units)
    return max(most, units + checkpoint)


def peak_going_up(plan: RunPlan, boundary: int, seen: int, units: int) -> int:
    """While there is a forward pass and no other, and after it.

    Args:
        plan, boundary, seen, units: as of peak_stored_bytes.
    """
    layers, solvers, most = len(plan.layers), plan.config.run.num_workers - 1, 0
    for streamed in range(1, layers + 1):
        # the boundary that the next layer starts from, and the one that it writes
        boundaries = 1 if streamed == layers else 2
        for finished in range(streamed + 1 if solvers else 1):
            begun = min(streamed, finished + solvers)
            held = (seen * (streamed - finished) + units * begun) // layers
            most = max(most, held + boundaries * boundary)
    for finished in range(layers + 1):  # streams are gone, and units are left
        begun = min(layers, finished + solvers + 1)
        most = max(most, (seen * (layers - finished) + units * begun) // layers)
    return most


def peak_by_segments(plan: RunPlan, boundary: int, tokens: int, units: int) -> int:
    """While there is a backward pass that writes what the experts see and feel.

    At most run.layers_in_flight - 1 layers wait for their units when a segment begins; all of its
    own layers' tokens come on top before their first unit is done.

    Args:
        plan, boundary, units: as of peak_stored_bytes.
        tokens: bytes of all planned layers' activations and gradients.
    """
    layers, workers = len(plan.layers), plan.config.run.num_workers
    limit = plan.config.run.layers_in_flight - 1
    most, before = 0, 0
    for own, during, after in segments_left(plan):
        older = min(before, limit)
        # whoever does not stream solves units meanwhile
        for finished in range(before - older, before + 1 if workers > 1 else before - older + 1):
            begun = min(before, finished + workers - 1)
            held = (tokens * (before + own - finished) + units * begun) // layers
            most = max(most, held + during * boundary)
        before += own
        # all do, until the next segment begins, or to the end
        last = before if before == layers else max(0, before - limit)
        for finished in range(before - own - older, last + 1):
            begun = min(before, finished + workers)
            held = (tokens * (before - finished) + units * begun) // layers
            most = max(most, held + after * boundary)
    return most


def segments_left(plan: RunPlan) -> Iterator[tuple[int, int, int]]:
    """For every segment of the backward pass, top first: layers of it that are compressed, and
    boundaries of both streams that are there at its end, and once what it read is gone."""
    passes = plan.passes
    for position, segment in enumerate(passes.segments):
        own = sum(n in segment for n in plan.layers)
        below = sum(base < segment.start for base in passes.bases)
        read = (segment.start in passes.bases) + passes.draws * (position > 0)
        written = passes.draws * (segment.start in passes.gradient_boundaries)
        yield own, below + read + written, below + written


def peak_layer_by_layer(plan: RunPlan, boundary: int, seen: int, felt: int, units: int) -> int:
    """Where the run goes layer by layer: first the gradients of all layers, then one layer's
    activations at a time beside those that still wait.

    Args:
        plan, boundary, seen, felt, units: as of peak_stored_bytes.
    """
    layers, most, streamed = len(plan.layers), 0, 0
    for own, during, _ in segments_left(plan):
        streamed += own
        most = max(most, felt * streamed // layers + during * boundary)
    for finished in range(layers):
        waiting = felt * (layers - finished)
        streaming = (waiting + units * finished) // layers + 2 * boundary
        most = max(most, streaming, (waiting + seen + units * (finished + 1)) // layers + boundary)
    return most


def num_boundaries(plan: RunPlan) -> int:
    """Of the residual stream, that are stored in all: the source's own, and those behind compressed
    layers."""
    return len(plan.passes.boundaries) + plan.propagates * plan.layers[-1]
