"""Routed experts, one at a time: the forward of a mixture whose weights are decoded when they are
used, with or without W4A4.

Legend: T tokens, H hidden size, F expert intermediate size, Z = 2 F (gate's values, then up's), K
experts a token, E experts of the layer, G groups of values that share a scale.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.headroom import group_amax
from p48ray.numerics.nvfp4 import SCALE_GROUP

INTERMEDIATE_STRIDE = 16
"""Of an expert's tokens in a call, one in so many has its groups counted: a share of a thousandth
does not need all of them."""


class ExpertWeights(NamedTuple):
    """The three linears of one expert: gate and up (F, H), down (H, F)."""

    gate_FH: Tensor
    up_FH: Tensor
    down_HF: Tensor

    @property
    def gate_up_ZH(self) -> Tensor:
        """Gate above up, (2 F, H); no copy where they were decoded into one tensor."""
        whole = self.gate_FH._base
        if (
            whole is not None
            and whole is self.up_FH._base
            and whole.shape[0] == 2 * len(self.gate_FH)
            and self.gate_FH.data_ptr() == whole.data_ptr()
        ):
            return whole
        return torch.cat([self.gate_FH, self.up_FH])


class RoutedInputs(NamedTuple):
    """What the experts of a layer saw in one call."""

    hidden_TH: Tensor
    expert_ids_TK: Tensor
    router_weights_TK: Tensor
    amax_by_expert_E: Tensor
    """Largest |h| of each expert's intermediates, float32; 0 for one without tokens."""
    group_amax_G: Tensor
    """Of the groups of every INTERMEDIATE_STRIDE-th intermediate of each expert, float32."""


class ActivationScales(NamedTuple):
    """Input global scales of a layer (divisors, see manifest.LayerScales) and the group that shares
    a local scale."""

    gate_up: float
    down: float
    group: int


def intermediate(x_TH: Tensor, weights: ExpertWeights) -> Tensor:
    """SwiGLU: silu(x gate^T) * (x up^T), (T, F). Source: Shazeer 2020, "GLU Variants Improve
    Transformer", equation 6."""
    return F.silu(F.linear(x_TH, weights.gate_FH)) * F.linear(x_TH, weights.up_FH)


class RoutedCall(NamedTuple):
    """One call of a mixture: (T, H) inputs, (T, K) expert ids and router weights."""

    hidden_TH: Tensor
    expert_ids_TK: Tensor
    router_weights_TK: Tensor


class RoutedExperts(nn.Module):
    """Stands in for a transformers experts module: the same call, but weights come from a function
    of the expert id.

    Calls can be deferred, so that several parts of a stream meet an expert together and it is
    decoded once for all of them. Every part is multiplied on its own, in the shapes that the plan
    gives it: what comes out does not depend on which parts share a worker.
    """

    def __init__(
        self,
        num_experts: int,
        weights: Callable[[int], ExpertWeights],
        scales: ActivationScales | None = None,
        observe: Callable[[RoutedInputs], None] | None = None,
        group: int = SCALE_GROUP,
    ) -> None:
        """No weight is asked for yet.

        Args:
            num_experts: of the layer.
            weights: expert id -> ExpertWeights in the compute dtype.
            scales: emulate W4A4 activations when given.
            observe: receives what the experts saw, after each call; None for nobody.
            group: values of an intermediate whose amax is observed together.
        """
        super().__init__()
        self.num_experts, self.weights, self.scales, self.observe = (
            num_experts,
            weights,
            scales,
            observe,
        )
        self.group = group
        self.recorded: list[RoutedCall] | None = None

    def forward(
        self, hidden_TH: Tensor, expert_ids_TK: Tensor, router_weights_TK: Tensor
    ) -> Tensor:
        """Sum over the routed experts of router weight times expert output, (T, H); zeros while
        calls are deferred."""
        call = RoutedCall(hidden_TH, expert_ids_TK, router_weights_TK)
        if self.recorded is None:
            return self.outputs([call])[0]
        self.recorded.append(call)
        return torch.zeros_like(hidden_TH)

    @contextmanager
    def deferred(self) -> Iterator[list[RoutedCall]]:
        """Calls made inside are recorded in the list, and answered with zeros."""
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None

    def outputs(self, calls: Sequence[RoutedCall]) -> list[Tensor]:
        """What `forward` would have answered to each call. An expert is decoded once, if any token
        goes to it.

        Each expert adds to distinct tokens, so the result does not depend on the order of atomics
        on a GPU.
        """
        outs = [torch.zeros_like(call.hidden_TH) for call in calls]
        # 16 bytes an expert: the kernel's pointer keeps its alignment
        amaxes = [
            torch.zeros(self.num_experts, 4, dtype=torch.float32, device=call.hidden_TH.device)
            for call in calls
        ]
        inputs = [
            c.hidden_TH if self.scales is None else self.quantized(c.hidden_TH, self.scales.gate_up)
            for c in calls
        ]
        groups: list[list[Tensor]] = [[] for _ in calls]
        fused = self.scales is None and is_fused(calls)
        for expert, weights, position, rows, slots in self.visits(calls):
            amax = amaxes[position][expert, 0]
            if fused:
                h_TF = kernels().swiglu(F.linear(inputs[position][rows], weights.gate_up_ZH), amax)
                if self.observe is not None:
                    groups[position].append(group_amax(h_TF[::INTERMEDIATE_STRIDE], self.group))
                shares_T = calls[position].router_weights_TK[rows, slots]
                kernels().add_rows(outs[position], rows, F.linear(h_TF, weights.down_HF), shares_T)
                continue
            h_TF = intermediate(inputs[position][rows], weights)
            amax.copy_(h_TF.abs().amax())
            if self.observe is not None:
                groups[position].append(group_amax(h_TF[::INTERMEDIATE_STRIDE], self.group))
            if self.scales is not None:
                h_TF = self.quantized(h_TF, self.scales.down)
            y_TH = (
                F.linear(h_TF, weights.down_HF)
                * calls[position].router_weights_TK[rows, slots, None]
            )
            outs[position].index_add_(0, rows, y_TH.to(outs[position].dtype))
        if self.observe is not None:
            for call, found, of_groups in zip(calls, amaxes, groups, strict=True):
                self.observe(RoutedInputs(*call, found[:, 0], torch.cat(of_groups).float()))
        return outs

    @torch.no_grad()
    def gradients(
        self, calls: Sequence[RoutedCall], at_outputs: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each call and the gradient at its output (T, H): those at its inputs (T, H) and at
        its router weights (T, K).

        Autograd would hold every expert that a token met, decoded, until the backward pass; here
        each is decoded, used and let go. The mixture's output itself is not needed. With u = g D:
        dw = sum(h u),  dh = w u,  and dx = da A + db B (numerics.output_gradients has the chain
        rule).
        Raises: AssertionError under W4A4 emulation, through which no gradient is taken.
        """
        assert self.scales is None
        found = [
            (torch.zeros_like(c.hidden_TH), torch.zeros_like(c.router_weights_TK)) for c in calls
        ]
        fused = is_fused(calls)
        for _, weights, position, rows, slots in self.visits(calls):
            if fused:
                u_TF = at_outputs[position][rows] @ weights.down_HF
                ab_TZ = F.linear(calls[position].hidden_TH[rows], weights.gate_up_ZH)
                dab_TZ, dw_T = kernels().swiglu_backward(
                    ab_TZ, u_TF, calls[position].router_weights_TK[rows, slots]
                )
                found[position][1][rows, slots] = dw_T.to(found[position][1].dtype)
                kernels().add_rows(found[position][0], rows, dab_TZ @ weights.gate_up_ZH)
                continue
            x_TH, w_T1 = (
                calls[position].hidden_TH[rows],
                calls[position].router_weights_TK[rows, slots, None],
            )
            u_TF = at_outputs[position][rows] @ weights.down_HF
            a_TF, b_TF = F.linear(x_TH, weights.gate_FH), F.linear(x_TH, weights.up_FH)
            s_TF = torch.sigmoid(a_TF)
            silu_TF = a_TF * s_TF
            at_inputs_TH, at_weights_TK = found[position]
            at_weights_TK[rows, slots] = (
                (silu_TF * b_TF * u_TF).sum(1, dtype=torch.float32).to(at_weights_TK.dtype)
            )
            u_TF = (u_TF * w_T1).to(u_TF.dtype)
            dx_TH = (u_TF * b_TF * s_TF * (1 + a_TF * (1 - s_TF))) @ weights.gate_FH + (
                u_TF * silu_TF
            ) @ weights.up_FH
            at_inputs_TH.index_add_(0, rows, dx_TH)
        return found

    def visits(
        self, calls: Sequence[RoutedCall]
    ) -> Iterator[tuple[int, ExpertWeights, int, Tensor, Tensor]]:
        """(an expert, its weights, position of a call, rows and slots of the tokens that the call
        sends there), expert by expert."""
        routes = [routes_by_expert(call.expert_ids_TK, self.num_experts) for call in calls]
        for expert in range(self.num_experts):
            meeting = [position for position, route in enumerate(routes) if len(route[expert][0])]
            if meeting:
                weights = self.weights(expert)
                for position in meeting:
                    yield expert, weights, position, *routes[position][expert]

    def quantized(self, x: Tensor, global_scale: float) -> Tensor:
        assert self.scales is not None
        return quantize_activations(x.float(), global_scale, self.scales.group).to(x.dtype)


def is_fused(calls: Sequence[RoutedCall]) -> bool:
    """Whether the elementwise steps have kernels for these tensors."""
    return all(
        call.hidden_TH.is_cuda
        and call.hidden_TH.dtype == torch.bfloat16
        and not call.hidden_TH.requires_grad
        for call in calls
    )


def kernels() -> ModuleType:
    from p48ray.kernels import swiglu  # Triton: only where there is a GPU

    return swiglu


def routes_by_expert(expert_ids_TK: Tensor, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """(rows, slots) of every expert, rows ascending. One sort and one copy to the host, not one of
    each for every expert."""
    flat = expert_ids_TK.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    top_k = expert_ids_TK.shape[1]
    return list(zip((order // top_k).split(counts), (order % top_k).split(counts), strict=True))
