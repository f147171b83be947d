"""What compression gains of the experts, by their shapes: bits a weight in the source, here, and in
sparse storage."""

from typing import NamedTuple

from p48ray.numerics.solution import PAIRED_48
from p48ray.report.size_card import is_equal_size
from p48ray.run.output_layout import unit_bytes
from p48ray.unit.context import StageContext


class Gains(NamedTuple):
    """Bits a weight of the experts, scales included. `sparse`: None where the weights have no such
    form."""

    source: float
    dense: float
    sparse: float | None

    @property
    def sparse_ratio(self) -> float:
        """Bytes of the experts in sparse storage, as a share of those in dense storage."""
        return (self.sparse or self.dense) / self.dense

    @property
    def is_same_size(self) -> bool:
        """The experts in dense storage are as large as the source's."""
        return is_equal_size(self.source, self.dense)


def gains(context: StageContext) -> Gains:
    """Of all experts of the source, whichever of them a pilot takes."""
    layout, compression = context.layout, context.plan.config.compression
    expert = 3 * layout.hidden_size * layout.moe_intermediate_size
    weights = len(layout.moe_layers) * layout.num_experts * expert
    source = context.source.expert_bytes(layout)
    unit = context.plan.units[0]
    dense, sparse = (
        8 * unit_bytes(layout, unit, storage) / (unit.num_experts * expert)
        for storage in ("dense", "sparse")
    )
    has_sparse = compression.sparsity == PAIRED_48 and compression.scale_span == 32
    return Gains(8 * source / weights, dense, sparse if has_sparse else None)
