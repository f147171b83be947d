"""Block descent on a GPU: the sweeps of numerics.block_descent and numerics.two_sided over buffers
with the input dimension first, panels by kernel.

    column_block | panel | panel | panel | panel |
                   each panel: one launch; then one small product corrects the rest of the block
    slope D H of a column_block: one product with all of D

A sweep is a fixed list of launches on buffers that stay where they are, so it is recorded the
second time and replayed as a CUDA graph. Two-sided, the rows are put into the order of the sweep's
row groups first; then a row group is a contiguous range, and its sweep, on buffers of its own, is
what is recorded.

Products round their operands to TF32 (numerics.products): a slope's error then is about 2^-12 of
its terms, so a sweep is monotone to that, not to 1e-7.

Legend: N experts, O out, I in, K pair_groups (I/8), B columns of a column_block, R rows of a row
group, S strips (I/32), C columns of a strip.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.collection import nothing_collected
from p48ray.kernels.descend_panel import PANEL, descend_panel_
from p48ray.kernels.strips import STRIP, pack_strips
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.products import tensor_float_32
from p48ray.numerics.relative_errors import hessian_loss

COLUMN_BLOCK = 1024


def block_descent(
    target_NOI: Tensor,
    values_NOI: Tensor,
    pattern_NOK: Tensor,
    hessian_NII: Tensor,
    solver_NK644: Tensor,
    sweeps: int,
    min_relative_gain: float,
) -> tuple[Tensor, Tensor]:
    """Sweeps of all rows; (values, patterns) in the layout they came in. Arguments as in
    block_descent.block_descent."""
    target_NIO, rows = _input_first(target_NOI, values_NOI, pattern_NOK)
    curved = Curved.of(hessian_NII, solver_NK644)

    def sweep() -> None:
        torch.sub(target_NIO, rows.values_NIR, out=rows.diff_NIR)
        sweep_(rows, curved)

    def loss() -> float:
        return float(hessian_loss((target_NIO - rows.values_NIR).mT, hessian_NII).sum())

    replayed = Replayed(sweep)
    current = loss() if min_relative_gain > 0 else 0.0
    for _ in range(sweeps):
        replayed()
        if min_relative_gain > 0:
            previous, current = current, loss()
            if previous - current < min_relative_gain * previous:
                break
    return _input_last(rows)


def two_sided_descent(
    target_NOI: Tensor,
    values_NOI: Tensor,
    pattern_NOK: Tensor,
    hessian_NII: Tensor,
    solver_NK644: Tensor,
    output_hessian_NOO: Tensor,
    partitions: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, Tensor]:
    """One sweep per partition of the rows into groups; (values, patterns) in the layout they came
    in. Arguments as in two_sided.two_sided_descent."""
    target_NIO, rows = _input_first(target_NOI, values_NOI, pattern_NOK)
    descent = TwoSided(target_NIO, rows, Curved.of(hessian_NII, solver_NK644), output_hessian_NOO)
    for groups in partitions:
        descent.arrange(torch.cat(list(groups)))
        first = 0
        for group in groups:
            descent.visit(first, first + len(group))
            first += len(group)
    descent.arrange(torch.arange(target_NOI.shape[1], device=target_NOI.device))
    return _input_last(rows)


@dataclass(slots=True, kw_only=True)
class Curved:
    """H and what the panels read of it."""

    hessian_NII: Tensor
    strips_NSCC: Tensor
    solver_NK644: Tensor  # of 4 pair_groups a strip

    @classmethod
    def of(cls, hessian_NII: Tensor, solver_NK644: Tensor) -> "Curved":
        strips_NSCC = pack_strips(hessian_NII, beyond=0.0)
        missing = strips_NSCC.shape[1] * (STRIP // INPUTS_IN_GROUP) - solver_NK644.shape[1]
        padded_NK644 = F.pad(solver_NK644, (0, 0) * 3 + (0, missing)).contiguous()
        return cls(
            hessian_NII=hessian_NII.contiguous(), strips_NSCC=strips_NSCC, solver_NK644=padded_NK644
        )


@dataclass(slots=True, kw_only=True)
class Rows:
    """Some rows, input dimension first: D (or its stand-in under a majorised target), values,
    patterns (uint8). Contiguous; a sweep changes them."""

    diff_NIR: Tensor
    values_NIR: Tensor
    pattern_NKR: Tensor


def sweep_(rows: Rows, curved: Curved) -> None:
    """One visit to every pair_group of the rows."""
    n, i, r = rows.diff_NIR.shape
    hessian_NII = curved.hessian_NII
    with tensor_float_32():
        for block_start in range(0, i, COLUMN_BLOCK):
            block_stop = min(block_start + COLUMN_BLOCK, i)
            change_NBR = torch.empty(n, block_stop - block_start, r, device=rows.diff_NIR.device)
            slope_NBR = torch.bmm(hessian_NII[:, block_start:block_stop], rows.diff_NIR)
            for start in range(block_start, block_stop, PANEL):
                stop = min(start + PANEL, block_stop)
                descend_panel_(
                    slope_NBR, change_NBR, rows.values_NIR, rows.pattern_NKR, hessian_NII,
                    curved.strips_NSCC, curved.solver_NK644, start=start, stop=stop,
                    slope_start=block_start,
                )  # fmt: skip
                if stop < block_stop:
                    slope_NBR[:, stop - block_start :].baddbmm_(
                        hessian_NII[:, stop:block_stop, start:stop],
                        change_NBR[:, start - block_start : stop - block_start],
                        alpha=-1,
                    )
            rows.diff_NIR[:, block_start:block_stop] -= change_NBR


class Replayed:
    """A function of buffers that stay where they are: run the first time, recorded as a graph the
    second, from then on replayed by one launch.

    The function must not refer to what holds this object: a graph that waits for the garbage
    collector may be destroyed while another is recorded, which spoils the recording. For the same
    reason nothing is collected meanwhile.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action, self.calls = action, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 1 or not torch.cuda.is_available():
            self.action()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with (
                nothing_collected(),
                torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
            ):  # another thread may fetch the next unit
                self.action()
        self.graph.replay()


class RowGroup:
    """Room for the rows of a group of one size, and its recorded sweep under the majorised target
    D' = (G D)_r / c."""

    def __init__(self, diff_NIO: Tensor, num_rows: int, curved: Curved) -> None:
        n, i, o = diff_NIO.shape
        coupling_NOR = torch.empty(n, o, num_rows, device=diff_NIO.device)
        bound_N1R = torch.empty(n, 1, num_rows, device=diff_NIO.device)
        rows = Rows(
            diff_NIR=torch.empty(n, i, num_rows, device=diff_NIO.device),
            values_NIR=torch.empty(n, i, num_rows, device=diff_NIO.device),
            pattern_NKR=torch.empty(
                n, i // INPUTS_IN_GROUP, num_rows, dtype=torch.uint8, device=diff_NIO.device
            ),
        )

        def sweep() -> None:
            with tensor_float_32():
                torch.bmm(diff_NIO, coupling_NOR, out=rows.diff_NIR)
            rows.diff_NIR.div_(bound_N1R)
            sweep_(rows, curved)

        self.coupling_NOR, self.bound_N1R, self.rows, self.sweep = (
            coupling_NOR,
            bound_N1R,
            rows,
            Replayed(sweep),
        )


class TwoSided:
    """A descent of all rows under G, with rows (and G's rows and columns) in the order of the
    sweep's row groups."""

    def __init__(
        self, target_NIO: Tensor, rows: Rows, curved: Curved, output_hessian_NOO: Tensor
    ) -> None:
        self.original_target_NIO, self.original_hessian_NOO = target_NIO, output_hessian_NOO
        self.target_NIO, self.output_hessian_NOO, self.rows, self.curved = (
            target_NIO.clone(),
            output_hessian_NOO.clone(),
            rows,
            curved,
        )
        self.order_O = torch.arange(target_NIO.shape[2], device=target_NIO.device)
        self.groups: dict[int, RowGroup] = {}

    def arrange(self, order_O: Tensor) -> None:
        """Row k is from now on row order_O[k] of the original."""
        change_O = self.order_O.argsort()[order_O]
        self.rows.values_NIR.copy_(self.rows.values_NIR[:, :, change_O])
        self.rows.pattern_NKR.copy_(self.rows.pattern_NKR[:, :, change_O])
        torch.index_select(self.original_target_NIO, 2, order_O, out=self.target_NIO)
        torch.sub(self.target_NIO, self.rows.values_NIR, out=self.rows.diff_NIR)
        self.output_hessian_NOO.copy_(
            self.original_hessian_NOO[:, order_O].index_select(2, order_O)
        )
        self.order_O = order_O

    def visit(self, first: int, stop: int) -> None:
        """One row group, rows first to stop as they lie."""
        if stop - first not in self.groups:
            self.groups[stop - first] = RowGroup(self.rows.diff_NIR, stop - first, self.curved)
        group, part = self.groups[stop - first], slice(first, stop)
        group.coupling_NOR.copy_(self.output_hessian_NOO[:, :, part])
        torch.sum(group.coupling_NOR[:, part].abs(), 1, keepdim=True, out=group.bound_N1R)
        group.rows.values_NIR.copy_(self.rows.values_NIR[:, :, part])
        group.rows.pattern_NKR.copy_(self.rows.pattern_NKR[:, :, part])
        group.sweep()
        self.rows.values_NIR[:, :, part] = group.rows.values_NIR
        self.rows.pattern_NKR[:, :, part] = group.rows.pattern_NKR
        torch.sub(
            self.target_NIO[:, :, part], group.rows.values_NIR, out=self.rows.diff_NIR[:, :, part]
        )


def _input_first(
    target_NOI: Tensor, values_NOI: Tensor, pattern_NOK: Tensor
) -> tuple[Tensor, Rows]:
    """(target, rows) with the input dimension first."""
    target_NIO, values_NIO = (
        t.mT.clone(memory_format=torch.contiguous_format) for t in (target_NOI, values_NOI)
    )
    pattern_NKO = pattern_NOK.mT.to(torch.uint8).contiguous()
    return target_NIO, Rows(
        diff_NIR=target_NIO - values_NIO, values_NIR=values_NIO, pattern_NKR=pattern_NKO
    )


def _input_last(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows.values_NIR.mT.contiguous(), rows.pattern_NKR.mT.long()
