"""What a worker asks of Ray, against what there is. A Ray that is started here never grows: what
this machine lacks is refused, and no more workers are asked for than have room. A cluster may get
new nodes, so there the wait is put in words."""

import logging
import math
import os
from collections.abc import Mapping

import torch

from p48ray.config import RunSettings
from p48ray.errors import ConfigError

log = logging.getLogger("p48ray.progress")

ROUNDING = 1e-6  # three shares of 0.3333333 are one GPU


def machine_gpus() -> int:
    """GPUs of this machine that a worker can compute on."""
    return torch.cuda.device_count()


def workers_here(run: RunSettings, num_gpus: int) -> int:
    """How many of run.num_workers this machine has room for at the same time.

    Threads are not limited: output bytes depend on their number, so a run may go on with it on a
    smaller machine, and Ray is told of as many CPUs as workers ask for.

    Args:
        num_gpus: of this machine.
    Raises: ConfigError where it has no room for one.
    """
    cpus = os.cpu_count() or 1
    if run.threads_per_worker > cpus:
        log.warning(
            "run.threads_per_worker: a worker has %d threads and this machine %d CPUs: they take"
            " turns, which is slow",
            run.threads_per_worker,
            cpus,
        )
    if run.gpus_per_worker > num_gpus:
        raise ConfigError(
            f"run.gpus_per_worker: expected at most the {num_gpus} GPUs of this machine, found"
            f" {run.gpus_per_worker:g}; set RAY_ADDRESS to a cluster that has them, or"
            " run.gpus_per_worker: 0 to compute on CPUs"
        )
    if not run.gpus_per_worker:
        return run.num_workers
    fit = (
        num_gpus * math.floor(1 / run.gpus_per_worker + ROUNDING)
        if run.gpus_per_worker < 1
        else num_gpus // int(run.gpus_per_worker)
    )
    if fit < run.num_workers:
        log.warning(
            "run.num_workers: %d asked for, of %g GPUs each; this machine has %d GPUs, so %d work"
            " at a time",
            run.num_workers,
            run.gpus_per_worker,
            num_gpus,
            fit,
        )
    return min(run.num_workers, fit)


def amount(resources: Mapping[str, float]) -> str:
    """Ray's resources in words: "8 CPU and 0 GPU"."""
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
