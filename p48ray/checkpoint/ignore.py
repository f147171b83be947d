"""Which linears are not quantized, as patterns for quantization_config.ignore.

Servers differ in what they make of a linear that no target names: vLLM leaves it plain, SGLang
refuses the model, TensorRT-LLM quantizes all that `ignore` does not name. So every linear outside
the compressed experts is named, by patterns that hold for its name on disk and for what servers
call it: with another prefix, or with neighbours fused into one (qkv_proj, gate_up_proj,
fused_qkv_a_proj_with_mqa). Where nothing in a part is compressed, the pattern names the part.

A pattern has to mean the same to whoever matches from the start of a name (compressed-tensors,
vLLM, SGLang) and to whoever matches the whole (TensorRT-LLM): hence `.*` in front and `$` or `.*`
at the end. No pattern may hold for an expert; `check_patterns` sees to it.
"""

import re
from collections.abc import Iterable, Sequence

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS, LayerNames
from p48ray.errors import P48Error

FUSED = {"gate_up_proj": {"gate_proj", "up_proj"}}
"""What servers make one linear of beside the experts, where all of them are there."""

HEAD_PATTERN = r"re:(.*\.)?lm_head$"
"""Servers have it even where the checkpoint ties it to the embedding."""

DRAFT_PARTS = (r"re:(.*\.)?decoder\..*", r"re:.*\.(eh_proj|shared_head\.head)$")
"""A layer of multi-token prediction as SGLang names it (model.decoder)."""

WEIGHT = ".weight"


def ignored(index: CheckpointIndex, names: LayerNames) -> list[str]:
    """Patterns for every linear of a checkpoint outside its compressed experts.

    Args:
        index: of the source, or of a finished checkpoint, whose names are the same.
        names: of it.
    Raises: P48Error if a pattern would hold for a compressed expert.
    """
    layers: set[str] = set()
    parts: set[str] = set()
    behind: set[int] = set()
    for entry in index.outside_experts(names):
        if not is_linear(entry.name, entry.shape):
            continue
        module = entry.name.removesuffix(WEIGHT)
        number, _, rest = module.removeprefix(names.layer_prefix).partition(".")
        if not module.startswith(names.layer_prefix) or not number.isdecimal():
            parts.add(module)
        elif int(number) < names.num_layers:
            layers.add(rest)
        else:
            behind.add(int(number))
    patterns = [
        *layer_patterns(layers),
        *part_patterns(parts, names),
        *(rf"re:.*\.layers\.{number}\..*" for number in sorted(behind)),
        *(DRAFT_PARTS if behind else ()),
    ]
    check_patterns(patterns, names)
    return patterns


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """By its header: a matrix called weight (an embedding too; naming one changes nothing)."""
    return name.endswith(WEIGHT) and len(shape) == 2


def layer_patterns(modules: Iterable[str]) -> list[str]:
    """Of linears by their names within a layer.

    What lies beside the routed experts (router, a dense layer's linears) is named one by one; any
    other part as a whole.
    """
    beside, wholes = set[str](), set[str]()
    for module in modules:
        part, _, rest = module.partition(".")
        inner, _, deeper = rest.partition(".")
        if part != "mlp":
            wholes.add(part)
        elif deeper:
            wholes.add(f"{part}.{inner}")
        else:
            beside.add(inner)
    beside |= {fused for fused, pieces in FUSED.items() if pieces <= beside}
    one_by_one = [rf"re:.*\.mlp\.({'|'.join(sorted(beside))})$"] if beside else []
    return [rf"re:.*\.{re.escape(part)}\..*" for part in sorted(wholes)] + one_by_one


def part_patterns(modules: Iterable[str], names: LayerNames) -> list[str]:
    """Of linears outside the layers: the head, a vision tower, a projector."""
    patterns = set[str]()
    for module in modules:
        if f"{module}{WEIGHT}" == names.embed_name:
            continue
        first, *inner = module.removeprefix("model.").split(".")
        if [first, *inner][-1] != "lm_head":
            part = re.escape(first)
            patterns.add(rf"re:(.*\.)?{part}\..*" if inner else rf"re:(.*\.)?{part}$")
    return [HEAD_PATTERN, *sorted(patterns)]


def check_patterns(patterns: Iterable[str], names: LayerNames) -> None:
    """Raises: P48Error if one holds for a compressed expert's linear, or a mixture, under the name
    on disk or without its prefix."""
    layer = names.moe_layers[0]
    linears = [names.expert_linear_name(layer, 0, projection) for projection in PROJECTIONS]
    assert all(EXPERT_NAME.fullmatch(f"{linear}.weight") for linear in linears)
    kept = [*linears, linears[0].rpartition(".")[0].rpartition(".")[0]]
    for pattern in patterns:
        expression = re.compile(pattern.removeprefix("re:"))
        for name in kept:
            if expression.match(name):
                raise P48Error(f"ignore pattern {pattern!r} would leave {name} unquantized")
