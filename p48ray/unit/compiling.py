"""A worker's kernels are compiled in a process beside it, while it streams or fetches; its first
unit waits for what is left.

One worker of a node compiles, the others find the results on its disk (kernels.precompile). Nothing
here can fail a task: what was not compiled ahead is compiled by whoever launches it first.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import p48ray
from p48ray.checkpoint.layout import ModelLayout
from p48ray.numerics.solvers import SOLVERS
from p48ray.run.plan import RunPlan

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # from the first unit's wait on; all kernels took 17 s in one process on an H200


class Compiling:
    """The process that compiles; it ends with the worker, whose end of its input goes then."""

    def __init__(self, command: list[str], patience_s: float = PATIENCE_S) -> None:
        """Raises: OSError where no process can be started."""
        folder = str(Path(p48ray.__file__).parents[1])
        paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.patience_s, self.is_over = patience_s, False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until all is compiled, at most patience_s. From any thread; at once when it was waited
        for before."""
        if self.is_over:
            return
        start = time.monotonic()
        try:
            code = self.process.wait(self.patience_s)
            if code:
                log.warning(
                    "kernels could not be compiled ahead (exit code %d): the first units compile"
                    " them",
                    code,
                )
            elif (waited := time.monotonic() - start) > 1:
                log.info("waited %.1f s for kernels to be compiled", waited)
        except subprocess.TimeoutExpired:
            log.warning(
                "kernels are not compiled after %.0f s: the first units compile what is missing",
                self.patience_s,
            )
        self.is_over = True

    def close(self) -> None:
        """End it, if it has not ended."""
        self.is_over = True
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_compiling(plan: RunPlan, layout: ModelLayout, device: torch.device) -> Compiling | None:
    """Begin to compile what this plan launches on this device; None on a CPU, or where no process
    can be started."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        return Compiling(command(plan, layout, torch.cuda.get_device_capability(device)))
    except OSError as error:
        log.warning("kernels are not compiled ahead: %s", error)
        return None


def command(plan: RunPlan, layout: ModelLayout, capability: tuple[int, int]) -> list[str]:
    """The command line of kernels.precompile for a plan on a card."""
    from p48ray.kernels.precompile import Launches

    c = plan.config.compression
    solver = SOLVERS[c.solver]
    launches = Launches(
        hidden=layout.hidden_size,
        intermediate=layout.moe_intermediate_size,
        span=c.scale_span,
        solves=solver.needs_hessian,
        picks_masks=c.sparsity == "paired-4:8",
        descends=solver.descends,
        two_sided=c.output_curvature,
        refines=c.refine_steps > 0,
        is_sparse=c.sparsity == "paired-4:8",
        int4_group=layout.int4_group_size or 0,
        streams=plan.config.calibration.compute_dtype == "bfloat16",
    )
    arch = 10 * capability[0] + capability[1]
    return [
        sys.executable,
        "-m",
        "p48ray.kernels.precompile",
        "--arch",
        str(arch),
        "--ends-with-input",
        *launches.arguments(),
    ]
