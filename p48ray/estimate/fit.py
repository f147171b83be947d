"""Whether a worker's memory and a run root's disk will do, said before hours are spent: what the
plan needs at its peaks against what a card, a machine and a disk have."""

import logging
import os
import shutil
from pathlib import Path

import torch

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.estimate.memory import Memory, memory_of
from p48ray.run.plan import RunPlan
from p48ray.store.local import LocalStore
from p48ray.store.open import scheme_of

log = logging.getLogger(__name__)

GB = 10**9
KEY_OF_STREAMS = "calibration.sequences_per_part (or raise run.capture_workers)"
KEY_OF_UNITS = "run.experts_per_unit (or run.prefetch_units)"


def shortages(memory: Memory, gpu_bytes: float | None, host_bytes: float | None) -> list[str]:
    """What does not fit, each with the key to lower.

    Args: gpu_bytes: of a worker's share of a card. host_bytes: of the machine. None: not known.
    """
    found = []
    if gpu_bytes is not None:
        for work, needed, key in (
            ("streaming", memory.gpu_stream, KEY_OF_STREAMS),
            ("a unit", memory.gpu_unit, KEY_OF_UNITS),
        ):
            if needed > gpu_bytes:
                found.append(
                    f"{work} needs about {needed / GB:.0f} GB of GPU memory and a worker has"
                    f" {gpu_bytes / GB:.0f}: lower {key}"
                )
    if host_bytes is not None and memory.host > host_bytes:
        found.append(
            f"a worker needs about {memory.host / GB:.0f} GB of memory and the machine has"
            f" {host_bytes / GB:.0f}: lower {KEY_OF_UNITS}, or {KEY_OF_STREAMS}"
        )
    return found


def lack_of_space(place: str, peak_bytes: int) -> str | None:
    """What the disk of a local folder lacks, in words; None where it has room, or where this
    machine does not have the folder that it is to lie in.

    Args:
        place: run.root or run.scratch.
        peak_bytes: that it holds at the most (Estimate.peak_stored_bytes, .peak_scratch_bytes).
    """
    root = Path(place)
    folder = next((place for place in (root, root.parent) if place.is_dir()), None)
    if not scheme_of(place).is_local or folder is None:
        return None
    held = sum(info.size_bytes for info in LocalStore(root).list()) if root.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if peak_bytes - held <= free:
        return None
    return (
        f"{root} needs about {(peak_bytes - held) / GB:,.1f} GB more at the peak and its disk has"
        f" {free / GB:,.1f} GB free: see run.keep, or take another folder"
    )


def warn_of_memory(
    plan: RunPlan, index: CheckpointIndex, layout: ModelLayout, device: torch.device
) -> None:
    """Log what will not fit on this worker's card and machine. An estimate: nothing is refused for
    it.

    Args:
        plan, layout: of the run.
        index: of its source.
        device: the worker's own.
    """
    share = (
        min(1.0, plan.config.run.gpus_per_worker)
        * torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda" and torch.cuda.is_available()
        else None
    )
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in shortages(memory_of(plan, index, layout), share, machine):
        log.warning("%s", line)
