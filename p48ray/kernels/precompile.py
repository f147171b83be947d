"""Compiles every kernel that a run will launch before the first unit needs one: `python -m
p48ray.kernels.precompile --arch 90 --hidden 7168 ...`

    the entry functions of this package, on meta tensors
        shapes are a run's own, nothing is allocated, nothing is launched
    -> each distinct specialisation, once
        Triton's jit_cache_hook is told of it and answers "do not compile"
    -> child processes take them one by one
        code for --arch into Triton's cache on disk, and the C launcher of its signature

What distinguishes two compilations of a kernel: its constexprs, the dtypes of its tensors, whether
an address is a multiple of 16, and of every integer whether it is 1, a multiple of 16, or more than
32 bits. All of that follows from the shapes and from the settings below, so a process of its own,
with neither a GPU context nor data, can do it while workers stream or fetch. A process that finds
the cache filled is done in a moment, and one process a cache works at a time.

With --ends-with-input it ends at once when its standard input does: whoever started it keeps the
other end, and nothing is left when that process is gone.
"""

import argparse
import fcntl
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p48ray.numerics.nvfp4 import SCALE_GROUP, SCALE_SPANS
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.refine import BETAS
from p48ray.numerics.two_sided import ROW_GROUPS

log = logging.getLogger(__name__)

PROCESSES = 4
LOCK = "p48ray-precompile.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """What decides which specialisations a run needs.

    hidden, intermediate: of an expert. span: inputs a weight scale. solves: the solver makes a pass
    over the columns. picks_masks: which chooses masks. descends: block descent follows, and a
    second pass under its masks. two_sided: it goes by row groups. refines: Adam's steps follow,
    is_sparse: on half of the weights. int4_group: weights a scale of the source, 0 for sources that
    are not INT4. streams: layers are streamed in bf16.
    """

    hidden: int
    intermediate: int
    span: int = 32
    solves: bool = True
    picks_masks: bool = True
    descends: bool = False
    two_sided: bool = False
    refines: bool = False
    is_sparse: bool = True
    int4_group: int = 0
    streams: bool = False

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        found = []
        for field in fields(self):
            found += [f"--{field.name.replace('_', '-')}", str(int(getattr(self, field.name)))]
        return found


class Unaligned:
    """Stands for a tensor that begins 8 bytes past a multiple of 16, as a part of a larger one
    may."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 8


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(wanted: Launches) -> None:
    """Call every entry function with arguments of every kind that the run's own calls have; the
    longest to compile first."""
    h, f = wanted.hidden, wanted.intermediate
    for num_outputs, num_inputs in ((2 * f, h), (h, f)):
        launch_solver(wanted, num_outputs, num_inputs)
    for width in (h, f):
        for group in SCALE_SPANS:  # evaluation measures both
            launch_activation(width, group)
    if wanted.int4_group:
        launch_int4(h, f, wanted.int4_group)
    if wanted.streams:
        launch_swiglu(h, f)


def launch_solver(wanted: Launches, num_outputs: int, num_inputs: int) -> None:
    """One linear's solve, as numerics.sparsegpt, block_descent, two_sided and refine have it on a
    GPU."""
    from p48ray.kernels import column_pass, descent, refine_step

    o, i = num_outputs, num_inputs
    if wanted.descends:
        curved = descent.Curved.of(meta(1, i, i), meta(1, i // INPUTS_IN_GROUP, 6, 4, 4))
        for r in row_counts(o, ROW_GROUPS if wanted.two_sided else 1):
            rows = descent.Rows(
                diff_NIR=meta(1, i, r),
                values_NIR=meta(1, i, r),
                pattern_NKR=meta(1, i // INPUTS_IN_GROUP, r, dtype=torch.uint8),
            )
            descent.sweep_(rows, curved)
    passes = (
        {wanted.picks_masks, wanted.picks_masks and not wanted.descends} if wanted.solves else ()
    )
    for picks in sorted(passes, reverse=True):
        column_pass.pass_(
            meta(1, i, o), meta(1, i // 2, o, dtype=torch.bool), meta(1, i, i), meta(1, i), meta(1),
            span=wanted.span, picks_masks=picks, rounds=True,
        )  # fmt: skip
    if wanted.refines:
        kept, scales = (
            o * i // 2 if wanted.is_sparse else o * i,
            (meta(1, o, i // SCALE_GROUP), meta(1, o, i // SCALE_GROUP)),
        )
        operand = meta(1, o, i, dtype=torch.bfloat16)
        refine_step.adam_step_(
            (meta(1, kept), meta(1, kept), meta(1, kept)), operand, operand, scales,
            meta(1, o, i // 2, dtype=torch.bool), meta(1), BETAS, 2, 0.3,
        )  # fmt: skip


def row_counts(num_rows: int, groups: int) -> set[int]:
    """Sizes of the row groups that torch.chunk makes."""
    return {len(part) for part in torch.arange(num_rows).chunk(groups)}


def launch_activation(width: int, group: int) -> None:
    """Whole groups of the calls' own numbers of tokens: a multiple of 16 of them, and any other
    number."""
    from p48ray.kernels import activation

    if width % group == 0:
        for num_tokens in (16, 17):
            activation.quantize_activations(meta(num_tokens, width), meta(), group)


def launch_int4(hidden: int, intermediate: int, group: int) -> None:
    from p48ray.kernels import int4

    for o, i in ((intermediate, hidden), (hidden, intermediate)):
        if i % group == 0 and group % 8 == 0:
            int4.decode_int4_bf16(
                meta(o, i // 8, dtype=torch.int32), meta(o, i // group, dtype=torch.bfloat16)
            )


def launch_swiglu(hidden: int, intermediate: int) -> None:
    """Families differ in the dtype of router weights; the rows of an expert are a part of a list
    that begins anywhere."""
    from p48ray.kernels import swiglu

    half = torch.bfloat16
    swiglu.swiglu(meta(17, 2 * intermediate, dtype=half), meta())
    out, y = meta(17, hidden, dtype=half), meta(17, hidden, dtype=half)
    for dtype in (half, torch.float32):
        swiglu.swiglu_backward(
            meta(17, 2 * intermediate, dtype=half),
            meta(17, intermediate, dtype=half),
            meta(17, dtype=dtype),
        )
    rows: Any
    for rows, weight in itertools.product(
        (meta(17, dtype=torch.int64), Unaligned(torch.int64)),
        (meta(17, dtype=half), meta(17, dtype=torch.float32), None),
    ):
        swiglu.add_rows(out, rows, y, weight)


class NoDevice:
    """What Triton asks a driver before it compiles, answered for a card that need not be there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def nothing_compiled(told: list[tuple[Any, str]]) -> Iterator[None]:
    """Launches inside are not compiled and do not happen; of each that would be compiled the kernel
    and its specialisation are put down once."""
    from triton import knobs

    seen: set[tuple[str, str]] = set()

    def hook(*, key: Any, fn: Any, compile: Any, **_: Any) -> bool:  # Triton names the arguments
        name = (fn.name, str(key))
        if name not in seen:
            seen.add(name)
            told.append((fn.jit_function, compile["specialization_data"]))
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def specialisations(wanted: Launches, arch: int) -> list[tuple[Any, str]]:
    """(kernel, its specialisation as Triton's JITFunction.preload takes it) of everything that a
    run launches on a card of compute capability arch / 10."""
    from triton.runtime import driver

    driver.set_active(NoDevice(arch))
    found: list[tuple[Any, str]] = []
    with nothing_compiled(found):
        launch_all(wanted)
    return found


def compile_one(kernel: Any, specialisation: str, with_launcher: bool) -> None:
    """Into Triton's cache, or out of it."""
    compiled = kernel.preload(specialisation)
    if with_launcher:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def compile_all(
    found: list[tuple[Any, str]], num_processes: int, with_launchers: bool, children: list[int]
) -> None:
    """Children take one after the other; `children` receives their process ids."""
    taken, given = os.pipe()
    os.write(given, bytes(range(len(found))))
    os.close(given)
    for _ in range(min(num_processes, len(found))):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                while number := os.read(taken, 1):
                    compile_one(*found[number[0]], with_launchers)
                code = 0
            except Exception:
                # whatever it is: the worker's first unit compiles that kernel, and the exit code
                # says so
                log.exception("a kernel was not compiled ahead")
            finally:
                os._exit(code)
        children.append(child)
    os.close(taken)


def failures(children: list[int]) -> int:
    """How many of the children failed, when all have ended."""
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def end_with_input(children: list[int]) -> None:
    """From now on, this process and its children, those to come as well, end when its standard
    input does."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        for process in (*children, os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process a folder at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def parsed(arguments: list[str]) -> tuple[argparse.Namespace, Launches]:
    parser = argparse.ArgumentParser(prog="python -m p48ray.kernels.precompile")
    parser.add_argument(
        "--arch", type=int, required=True, help="compute capability times 10, such as 90"
    )
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument(
        "--kernels-only",
        action="store_true",
        help="no C launchers, which need libcuda: on a machine without a GPU",
    )
    parser.add_argument(
        "--ends-with-input", action="store_true", help="end when standard input does"
    )
    for field in fields(Launches):
        is_needed = field.default is MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            default=argparse.SUPPRESS,
            required=is_needed,
        )
    given = parser.parse_args(arguments)
    named = {
        field.name: getattr(given, field.name)
        for field in fields(Launches)
        if hasattr(given, field.name)
    }
    # 1 and True are different constexprs
    flags = {field.name for field in fields(Launches) if isinstance(field.default, bool)}
    return given, Launches(
        **{name: bool(value) if name in flags else value for name, value in named.items()}
    )


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 if everything is in the cache."""
    from triton import knobs

    start = time.monotonic()
    given, wanted = parsed(arguments)
    children: list[int] = []
    if given.ends_with_input:  # before the lock: who waits for it is to end too
        end_with_input(children)
    with alone(Path(knobs.cache.dir)):
        found = specialisations(wanted, given.arch)
        if not given.kernels_only:
            from triton.backends.nvidia.driver import CudaUtils

            CudaUtils()
        compile_all(found, given.processes, not given.kernels_only, children)
        failed = failures(children)
    log.info(
        "%d specialisations of kernels after %.1f s, %d processes failed",
        len(found),
        time.monotonic() - start,
        failed,
    )
    return int(failed > 0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
