"""An NVFP4 mixture in plain torch, in the slot of vLLM's emulation: vLLM has no such kernel for a
CPU.

The weights are decoded where they are used, from the tensors and scales that vLLM's own method has
prepared for its emulation backend. Their inputs stay as they are, or go through vLLM's own
reference quantization, as `quantizes_activations` says. Everything is float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    ref_nvfp4_quant_dequant,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decode(packed_OB: Tensor, scale_OG: Tensor, factor: Tensor) -> Tensor:
    """(O, I): two codes a byte, low nibble first; a local scale per 16; factor: one over the global
    scale."""
    codes_OI = torch.stack([packed_OB & 15, packed_OB >> 4], -1).flatten(1).int()
    return (
        E2M1[codes_OI].unflatten(1, (-1, 16)) * (scale_OG.float() * factor).unsqueeze(-1)
    ).flatten(1)


class TorchNvfp4Experts(modular_kernel.FusedMoEExpertsModular):
    quantizes_activations: ClassVar[bool] = False
    calls: ClassVar[int] = 0

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> modular_kernel.FusedMoEActivationFormat:
        return modular_kernel.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: object, activation_key: object) -> bool:
        return (weight_key, activation_key) == (kNvfp4Static, kNvfp4Dynamic)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(config: object) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self, M: int, N: int, K: int, *rest: object
    ) -> tuple[tuple[int, ...], ...]:
        return (1,), (1,), (M, K)

    def quantized(self, x: Tensor, global_scale: Tensor) -> Tensor:
        return ref_nvfp4_quant_dequant(x, global_scale, 16) if self.quantizes_activations else x

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        **_: Any,
    ) -> None:
        """Into output (T, H): the sum over a token's experts of router weight times expert output.
        w1: gate over up."""
        type(self).calls += 1
        scales = self.quant_config
        x_TH = self.quantized(hidden_states, scales.a1_gscale)
        output.zero_()
        for expert in topk_ids.unique().tolist():
            rows, slots = torch.where(topk_ids == expert)
            gate, up = F.linear(
                x_TH[rows], decode(w1[expert], scales.w1_scale[expert], scales.g1_alphas[expert])
            ).chunk(2, -1)
            h_TF = self.quantized(F.silu(gate) * up, scales.a2_gscale)
            y_TH = F.linear(
                h_TF, decode(w2[expert], scales.w2_scale[expert], scales.g2_alphas[expert])
            )
            output.index_add_(0, rows, y_TH * topk_weights[rows, slots, None])


@contextmanager
def in_the_emulations_slot() -> Iterator[None]:
    """vLLM still goes through its backends in its own order, and finds this one where its emulation
    was."""
    stock: Callable[[oracle.NvFp4MoeBackend], list[type]] = oracle.backend_to_kernel_cls

    def kernels(backend: oracle.NvFp4MoeBackend) -> list[type]:
        return (
            [TorchNvfp4Experts] if backend == oracle.NvFp4MoeBackend.EMULATION else stock(backend)
        )

    with mock.patch.object(oracle, "backend_to_kernel_cls", kernels):
        yield
