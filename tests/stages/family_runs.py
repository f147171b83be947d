"""The whole job on the small checkpoint of a family, in this process: curvature on both sides,
shards of a few tensors, nothing kept but the result."""

from pathlib import Path

import torch

from p48ray.stages.prepare import prepare
from tests.reference import tiny_families
from tests.stages.small_run import SmallRun, configure, run_locally

SETTINGS = (
    "compression.output_curvature=true",
    "compression.refine_steps=2",
    "run.keep=checkpoint",
    "output.max_shard_size=400KB",
)


def finished_family(family: str, folder: Path) -> SmallRun:
    source = tiny_families.write_release(family, folder / "source")
    torch.set_num_threads(1)
    prepared = prepare(configure(source, folder / "run", *SETTINGS))
    return SmallRun(
        root=folder / "run", source=source, prepared=prepared, report=run_locally(prepared)
    )
