"""How a model's weights are laid out: one frozen record, from which every name of a routed expert
follows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three linears of an expert, in the order of its forward pass: down(silu(gate(x)) * up(x))."""

ExpertStorage = Literal["int4", "fp8", "bf16", "paired48", "paired48-dense"]

EXPERT_SUFFIXES: Mapping[ExpertStorage, tuple[str, ...]] = MappingProxyType(
    {
        "int4": ("weight_packed", "weight_scale", "weight_shape"),
        "fp8": ("weight_scale_inv", "weight"),
        "bf16": ("weight",),
        "paired48": (
            "weight_sparse_packed",
            "weight_sparse_mask",
            "weight_scale",
            "weight_global_scale",
            "input_global_scale",
        ),
        "paired48-dense": (
            "weight_packed",
            "weight_scale",
            "weight_global_scale",
            "input_global_scale",
        ),
    }
)
"""The tensors of one expert linear, by storage. "bf16" stands for any plain float: BF16, F16 or
F32."""

SOURCE_STORAGES: tuple[ExpertStorage, ...] = ("int4", "fp8", "bf16")
"""Of what can be compressed. The first tensor of each is one that no storage behind it has."""

FOREIGN_STORAGES: tuple[ExpertStorage, ...] = ("paired48", "paired48-dense")
"""Of checkpoints that others have compressed (checkpoint.foreign); config.json says which."""

EXPERT_NAME = re.compile(
    r"(.*\.|)layers\.(0|[1-9]\d*)\.mlp\.experts\.(0|[1-9]\d*)\.(gate_proj|up_proj|down_proj)\.(\w+)"
)
"""(prefix, layer, expert, projection, suffix) of a routed expert's tensor; shared experts have no
number and do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """What a checkpoint calls its layers and its experts, be it a source or a finished one.
    `layer_prefix` ends before a layer's number ("language_model.model.layers.")."""

    layer_prefix: str
    embed_name: str
    num_layers: int
    moe_layers: tuple[int, ...]

    def expert_linear_name(self, layer: int, expert: int, projection: str) -> str:
        """The module's name in the checkpoint, without a tensor's suffix."""
        return f"{self.layer_prefix}{layer}.mlp.experts.{expert}.{projection}"

    @property
    def expert_scope(self) -> tuple[str, int]:
        """All that decides which tensors are experts': what stands before a layer's number, and how
        many layers the model runs."""
        return self.layer_prefix, self.num_layers

    def is_expert_tensor(self, name: str) -> bool:
        """True for the tensors that compression replaces: those of routed experts in the layers
        that the model runs. Of a whole checkpoint, CheckpointIndex.outside_experts knows it."""
        prefix, num_layers = self.expert_scope
        found = EXPERT_NAME.fullmatch(name)
        return found is not None and f"{found[1]}layers." == prefix and int(found[2]) < num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout(LayerNames):
    """Names and sizes of one source, read from its config and headers. `int4_group_size` is
    None unless experts are INT4.

    `fp8_block` is (outputs, inputs) that share a scale where any linear is stored in FP8, in or
    outside the experts; None without such. `head_name` is the embedding's where they are tied.
    `passthrough_expert_layers` are layers behind the last one (multi-token prediction) that hold
    experts too: they stay as they are.
    """

    family: str
    text_config: dict[str, Any]
    text_config_path: tuple[str, ...]
    norm_name: str
    head_name: str
    passthrough_expert_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    expert_storage: ExpertStorage
    int4_group_size: int | None
    fp8_block: tuple[int, int] | None = None

    @property
    def expert_suffixes(self) -> tuple[str, ...]:
        """The tensors of one expert linear in this checkpoint."""
        return EXPERT_SUFFIXES[self.expert_storage]

    def expert_tensor_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """All tensors of one expert: gate, up, down, each with all its suffixes."""
        linears = [self.expert_linear_name(layer, expert, projection) for projection in PROJECTIONS]
        return tuple(f"{linear}.{suffix}" for linear in linears for suffix in self.expert_suffixes)

    def linear_shape(self, projection: str) -> tuple[int, int]:
        """(out features, in features) of an expert's linear."""
        if projection == "down_proj":
            return (self.hidden_size, self.moe_intermediate_size)
        return (self.moe_intermediate_size, self.hidden_size)
