"""What the model card says of sizes, and of what is gained where they are equal. Every figure is
counted from the source's headers and the plan."""

from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.numerics.solution import PAIRED_48
from p48ray.report.storage_card import SERVER
from p48ray.run.output_layout import unit_bytes
from p48ray.unit.context import StageContext

EQUAL_WITHIN = 0.01

SOURCE_ACTIVATIONS = {"int4": "16", "fp8": "8", "bf16": "16"}
"""Bits of what the source's experts are multiplied with, by their storage."""


def expert_bytes(context: StageContext, storage: Storage) -> int:
    return sum(unit_bytes(context.layout, unit, storage) for unit in context.plan.units)


def is_equal_size(before: float, after: float) -> bool:
    """Whether two sizes are equal, but for one linear's shape and another's global scale."""
    return abs(after / before - 1) < EQUAL_WITHIN


def bits_a_weight(context: StageContext, num_bytes: int) -> float:
    layout = context.layout
    experts = sum(unit.num_experts for unit in context.plan.units)
    return 8 * num_bytes / (3 * layout.hidden_size * layout.moe_intermediate_size * experts)


def size_rows(context: StageContext) -> list[tuple[str, str]]:
    """Bytes of the experts' tensors before and after."""
    before, after = context.source.expert_bytes(context.layout), expert_bytes(context, "dense")
    return [
        (
            "size of the experts",
            (
                f"{after:,} bytes, {bits_a_weight(context, after):.2f} bits a weight (source:"
                f" {before:,}, {bits_a_weight(context, before):.2f})"
            ),
        )
    ]


def gains_section(context: StageContext) -> str:
    """The section on what this checkpoint has over its source."""
    before, dense = context.source.expert_bytes(context.layout), expert_bytes(context, "dense")
    was, now = (f"{bits_a_weight(context, num):.2f}" for num in (before, dense))
    is_equal = is_equal_size(before, dense)
    size = (
        f"Equal in dense storage: {now} bits a weight, {was} in the source."
        if is_equal
        else f"{dense / before:.2f} times the source's bytes in dense storage: {now} bits a weight,"
        f" {was} in the source."
    )
    lines = [f"- **Size of the experts.** {size}", f"- **Arithmetic.** {arithmetic(context)}"]
    c = context.plan.config.compression
    if c.sparsity == PAIRED_48 and c.scale_span == 32:
        sparse = expert_bytes(context, "sparse")
        beside = "" if is_equal else f" and {sparse / before:.2f} times the source's"
        lines.append(
            f"- **Sparse storage.** The same weights in {sparse:,} bytes,"
            f" {bits_a_weight(context, sparse):.2f} bits a weight: {sparse / dense:.2f} times the"
            f" dense ones{beside}. `p48ray convert` makes either storage of the other without loss;"
            f" this one is for {SERVER}."
        )
    return "\n".join([*lines, "\nSpeed was not measured by the job that made this checkpoint."])


def arithmetic(context: StageContext) -> str:
    """What is multiplied with what."""
    layout = context.layout
    return (
        "The experts' weights and activations meet in 4 bits (W4A4). The source's"
        f" {source_form(layout)} weights are multiplied with activations of"
        f" {SOURCE_ACTIVATIONS[layout.expert_storage]} bits."
    )


def source_form(layout: ModelLayout) -> str:
    return {
        "int4": f"INT4 (a scale per {layout.int4_group_size} inputs)",
        "fp8": "FP8",
        "bf16": "plain",
    }[layout.expert_storage]
