"""A finished run's layer 1, opened again under other settings."""

import uuid
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from p48ray.model.experts import RoutedInputs
from p48ray.run import arrow, run_root
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.run.plan import WorkUnit
from p48ray.run.scales import combine_scales
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import write_activations
from p48ray.stages.gradients import write_gradients
from p48ray.stages.prepare import prepare
from p48ray.unit.context import StageContext
from tests.stages.small_run import SmallRun, configure

PAIR = WorkUnit(layer=1, first_expert=4, num_experts=2)
Opener = Callable[..., StageContext]


def shard_bytes(context: StageContext, manifest: UnitManifest) -> bytes:
    return context.store.get(run_root.unit_shard(manifest.unit, manifest.attempt))


@pytest.fixture(scope="module")
def layer_inputs(finished: SmallRun) -> RoutedInputs:
    """What layer 1's experts saw in the finished run, all parts in one."""
    store = finished.prepared.store
    parts = [
        arrow.decode(store.get(run_root.activation_part(1, p.part)), "part")
        for p in finished.prepared.plan.parts
    ]
    columns = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    scales = LayerScales.load(store, run_root.layer_scales(1))
    num_experts = len(scales.tokens_per_expert)
    amax_E = torch.full((num_experts,), scales.amax_intermediate)
    return RoutedInputs(
        columns["hidden"],
        columns["expert_ids"].long(),
        columns["router_weights"],
        amax_E,
        amax_E[:1],
    )


@pytest.fixture(scope="module")
def random_delta(layer_inputs: RoutedInputs) -> Tensor:
    """Gradients at the mixture's output, a few tokens' much larger than the others'."""
    generator = torch.Generator().manual_seed(0)
    size_T1 = torch.rand(len(layer_inputs.hidden_TH), 1, generator=generator).pow(4) + 0.01
    return (size_T1 * torch.randn(layer_inputs.hidden_TH.shape, generator=generator)).bfloat16()


@pytest.fixture
def opened(finished: SmallRun, layer_inputs: RoutedInputs, random_delta: Tensor) -> Opener:
    """Makes a fresh run in memory whose layer 1 saw `seen` (the finished run's tokens by default),
    under other settings.

    Where they ask for gradients, `delta` is what came back.
    """

    def make(
        *overrides: str, seen: RoutedInputs = layer_inputs, delta_TH: Tensor = random_delta
    ) -> StageContext:
        config = configure(finished.source, f"memory://{uuid.uuid4().hex}", *overrides)
        context = prepare(config).context
        tokens = [p.num_sequences * config.calibration.sequence_length for p in context.plan.parts]
        rows = zip(*(seen_part.split(tokens) for seen_part in seen[:3]), strict=True)
        with BlobWriter(context) as writer:
            for part, three in zip(context.plan.parts, rows, strict=True):
                write_activations(context, writer, 1, part, RoutedInputs(*three, *seen[3:]), 0.0)
            parts = writer.drain()
        context.store.put(
            run_root.layer_scales(1), combine_scales(context.plan, 1, parts).to_json()
        )
        if config.compression.output_curvature:
            with BlobWriter(context) as writer:
                for part, rows_TH in zip(context.plan.parts, delta_TH.split(tokens), strict=True):
                    write_gradients(context, writer, 1, part, rows_TH, 0.0)
        return context

    return make
