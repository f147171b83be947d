"""One decoder layer at a time, with the modules that transformers has for the model: built empty,
filled by byte range, run, dropped.

Nothing here ever holds more than one layer. The routed experts are replaced by `RoutedExperts`,
which is handed an expert when it is used.

Legend: B sequences, S positions, H hidden size, V vocabulary, R values of a rotary embedding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from p48ray.checkpoint.decode import decode_plain, read_plain
from p48ray.checkpoint.families import FAMILIES
from p48ray.checkpoint.fp8 import as_plain
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layer_reader import LayerReader
from p48ray.checkpoint.layout import ModelLayout
from p48ray.errors import SourceError
from p48ray.model.architecture import architecture, empty_layer, model_config
from p48ray.model.experts import RoutedExperts
from p48ray.store.node_cache import NodeCache


class Decoder:
    """The model as a stream: embedding, layers on demand, final norm and head. Holds the
    configuration and file positions, and one layer as stored."""

    def __init__(
        self,
        index: CheckpointIndex,
        layout: ModelLayout,
        device: torch.device,
        dtype: torch.dtype,
        cache: NodeCache | None = None,
    ) -> None:
        """No weight is read yet.

        Args:
            index, layout: the source.
            device, dtype: where and in what precision layers run.
            cache: of this node, for sources in a bucket; None reads the source itself.
        """
        self.index, self.layout, self.device, self.dtype = index, layout, device, dtype
        self.reader = LayerReader(index, layout.layer_prefix, cache)
        self.family = FAMILIES[layout.family]
        self.arch = architecture(self.family)
        self.config = model_config(self.arch, layout.text_config)
        self.rotary = self.arch.rotary(self.config).to(device)

    def read(self, name: str) -> Tensor:
        tensor = (
            as_plain(self.index, self.layout, self.index.tensors[name])
            if name in self.index.tensors
            else None
        )
        if tensor is None:
            raise SourceError(
                f"{self.index.store.uri}: tensor {name} is missing; the model can not run"
                " without it"
            )
        return read_plain(self.index.store, [tensor])[name]

    def embed(self, token_ids_BS: Tensor) -> Tensor:
        """(B, S) ids -> (B, S, H) in the compute dtype."""
        table_VH = self.read(self.layout.embed_name)
        return table_VH[token_ids_BS.long()].to(self.device, self.dtype)

    def layer(self, number: int, experts: RoutedExperts | None) -> Any:
        """Layer `number`, a transformers decoder layer, filled with the source's weights; its
        routed experts replaced by `experts` (None for a dense layer).

        Raises: SourceError naming the tensors that are missing or left over.
        """
        module = empty_layer(self.arch, self.config, number, experts)
        prefix = f"{self.layout.layer_prefix}{number}."
        stored = self.reader.tensors(number)
        entries = [self.index.tensors[name] for name in stored if self.family.fills_layer(name)]
        tensors = [
            tensor
            for entry in entries
            if (tensor := as_plain(self.index, self.layout, entry)) is not None
        ]
        state = {
            name.removeprefix(prefix): self.placed(name, t)
            for name, t in decode_plain(stored, tensors).items()
        }
        wanted = set(module.state_dict())
        if wanted != set(state):
            raise SourceError(
                f"{self.index.store.uri}: layer {number}: missing tensors"
                f" {sorted(wanted - set(state))[:5]}, unexpected {sorted(set(state) - wanted)[:5]}"
            )
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def prefetch(self, number: int) -> None:
        """Begin to fetch the layer that will be asked for next, where it comes from afar."""
        self.reader.prefetch(number)

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if name.endswith(self.family.float32_tensors) else self.dtype
        return tensor.to(self.device, dtype)

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary embedding for positions 0..length-1, (1, S, R) each."""
        ids_1S = torch.arange(length, device=self.device)[None]
        return self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), ids_1S)

    def head(self) -> nn.Module:
        """Final norm and output projection: (..., H) -> (..., V) logits in the compute dtype."""
        with torch.device("meta"):
            norm = self.arch.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(
            self.placed("", self.read(self.layout.norm_name)), requires_grad=False
        )
        weight_VH = self.placed("", self.read(self.layout.head_name))
        projection = nn.Linear(weight_VH.shape[1], weight_VH.shape[0], bias=False, device="meta")
        projection.weight = nn.Parameter(weight_VH, requires_grad=False)
        return nn.Sequential(norm, projection)


def run_layer(
    layer: Any, x_BSH: Tensor, positions: tuple[Tensor, Tensor], micro_batch: int
) -> Tensor:
    """One decoder layer on a part: attention by micro-batches of sequences, the mixture on all
    tokens of the part at once.

    The split is the same whoever runs the part, so the sums are too. Source:
    DeepseekV3DecoderLayer.forward of transformers.

    Args:
        layer: of Decoder.layer.
        x_BSH: the residual stream that enters it, of all sequences of the part.
        positions: Decoder.positions(S).
        micro_batch: sequences that attention takes together.
    """
    return mix(layer, [attend(layer, x_BSH, positions, micro_batch)])[0]


def attend(layer: Any, x_BSH: Tensor, positions: tuple[Tensor, Tensor], micro_batch: int) -> Tensor:
    """The first half of a layer: the residual stream after attention.

    Args:
        layer, x_BSH, positions, micro_batch: as run_layer takes them.
    Returns: (B, S, H), a new tensor.
    """
    attended = []
    for x in x_BSH.split(micro_batch):
        out, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=positions,
            attention_mask=None,
        )
        attended.append(x + out)
    return torch.cat(attended)


def mix(layer: Any, attended: list[Tensor]) -> list[Tensor]:
    """The second half, of several parts together: an expert of a mixture is decoded once for all of
    them.

    A block of transformers adds its shared experts to what the routed ones answer, so their zeros
    leave the shared experts' part, and the sum is the same.
    """
    experts = routed_experts(layer)
    if experts is None:
        return [x + layer.mlp(layer.post_attention_layernorm(x)) for x in attended]
    with experts.deferred() as calls:
        rest = [layer.mlp(layer.post_attention_layernorm(x)) for x in attended]
    routed = experts.outputs(calls)
    return [attended[i] + (routed[i].view_as(rest[i]) + rest[i]) for i in range(len(attended))]


def routed_experts(layer: Any) -> RoutedExperts | None:
    """The layer's routed experts; None for a dense layer."""
    found = getattr(layer.mlp, "experts", None)
    return found if isinstance(found, RoutedExperts) else None
