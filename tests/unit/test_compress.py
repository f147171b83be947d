"""One unit: what it stores, what its manifest claims, and what it makes of experts that saw little
or nothing."""

import hashlib
import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors import safe_open
from torch import Tensor

from p48ray.checkpoint.index import open_checkpoint
from p48ray.errors import CorruptObjectError, NumericsError, ShardCorruptError
from p48ray.estimate.memory import routed_token_bytes
from p48ray.model.experts import RoutedInputs
from p48ray.numerics import block_int8
from p48ray.run import run_root
from p48ray.run.manifest import LayerScales, LinearRecord, UnitManifest
from p48ray.run.plan import WorkUnit
from p48ray.run.scale_counts import ScaleCounts
from p48ray.stages.compressed_experts import compressed_expert
from p48ray.store import LocalStore
from p48ray.unit import moments, refinement, routed_tokens, token_columns
from p48ray.unit.compress import compress_unit, count_weight_scales
from p48ray.unit.context import StageContext
from p48ray.unit.token_columns import reserve_spill
from tests.conftest import TINY
from tests.reference import whole_model
from tests.stages.slow_nvfp4 import decode_weights, quantize_tokens
from tests.stages.small_run import SmallRun
from tests.unit.conftest import PAIR, Opener, shard_bytes

PREFIX = "language_model.model.layers"
# (out, in) in the small model
SHAPES = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}


@dataclass
class Shard:
    """One unit's safetensors file as safetensors' own library reads it."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, data: bytes, folder: Path) -> "Shard":
        path = folder / f"{uuid.uuid4().hex}.safetensors"
        path.write_bytes(data)
        with safe_open(path, "pt") as opened:
            return cls({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)

    def linear(self, layer: int, expert: int, projection: str) -> dict[str, Tensor]:
        stem = f"{PREFIX}.{layer}.mlp.experts.{expert}.{projection}."
        return {
            name.removeprefix(stem): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(stem)
        }


@pytest.fixture(scope="module")
def source_tensors() -> dict[str, Tensor]:
    return whole_model.read_all(TINY)


def compress(context: StageContext, unit: WorkUnit = PAIR) -> bytes:
    return shard_bytes(context, compress_unit(context, unit))


def record_of(manifest: UnitManifest, expert: int, projection: str) -> LinearRecord:
    name = f"{PREFIX}.1.mlp.experts.{expert}.{projection}"
    return next(r for r in manifest.linears if r.name == name)


# What is stored


def test_shard_has_exactly_the_four_tensors_of_every_linear(
    finished: SmallRun, tmp_path: Path
) -> None:
    for unit in finished.prepared.plan.units:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        shard = Shard.of(shard_bytes(finished.context, manifest), tmp_path)
        expected = {}
        for expert in unit.experts:
            for projection, (out, inputs) in SHAPES.items():
                stem = f"{PREFIX}.{unit.layer}.mlp.experts.{expert}.{projection}"
                expected[f"{stem}.weight_packed"] = (torch.uint8, (out, inputs // 2))
                expected[f"{stem}.weight_scale"] = (torch.float8_e4m3fn, (out, inputs // 16))
                expected[f"{stem}.weight_global_scale"] = (torch.float32, (1,))
                expected[f"{stem}.input_global_scale"] = (torch.float32, (1,))
        assert {name: (t.dtype, tuple(t.shape)) for name, t in shard.tensors.items()} == expected


def test_global_scales_are_positive_and_shared_where_servers_fuse(
    finished: SmallRun, tmp_path: Path
) -> None:
    """Gate and up share both; input scales are the layer's."""
    for unit in finished.prepared.plan.units:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        shard = Shard.of(shard_bytes(finished.context, manifest), tmp_path)
        scales = json.loads(
            finished.prepared.store.get(f"activations/layer-{unit.layer:03d}/scales.json")
        )
        wanted = {
            "gate_proj": scales["gate_up"],
            "up_proj": scales["gate_up"],
            "down_proj": scales["down"],
        }
        for expert in unit.experts:
            linears = {p: shard.linear(unit.layer, expert, p) for p in SHAPES}
            assert torch.equal(
                linears["gate_proj"]["weight_global_scale"],
                linears["up_proj"]["weight_global_scale"],
            )
            for projection, linear in linears.items():
                assert (
                    torch.isfinite(linear["weight_global_scale"]).all()
                    and (linear["weight_global_scale"] > 0).all()
                )
                assert torch.equal(linear["input_global_scale"], torch.tensor([wanted[projection]]))


def test_blocks_of_weights_with_small_scales_are_counted(
    finished: SmallRun, tmp_path: Path
) -> None:
    """Each block of 16 of the shard, by its stored scale; no expert of the model has a block of
    zeros."""
    for unit in finished.prepared.plan.units[:2]:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        shard = Shard.of(shard_bytes(finished.context, manifest), tmp_path)
        scales = torch.cat(
            [
                t.float().flatten()
                for name, t in shard.tensors.items()
                if name.endswith(".weight_scale")
            ]
        )
        assert manifest.weight_scales == ScaleCounts(
            groups=len(scales),
            subnormal=int(((scales > 0) & (scales < 2**-6)).sum()),
            zero=int((scales == 0).sum()),
        )


def test_lost_blocks_of_weights_are_those_with_weights_and_a_small_scale() -> None:
    """Of six blocks two are all zeros; of the others one has lost bits and one is lost."""
    weight_NOI = torch.zeros(1, 2, 48)
    weight_NOI[0, 0, [0, 17]] = torch.tensor([-1.0, 2.0])
    weight_NOI[0, 1, [0, 17]] = torch.tensor([3.0, -4.0])
    scale_NOG = torch.tensor([[[2.0**-6, 2.0**-7, 0.0], [0.0, 448.0, 0.0]]])
    solution = SimpleNamespace(scale_NOG=scale_NOG.to(torch.float8_e4m3fn))
    found = count_weight_scales(weight_NOI, solution)  # type: ignore[arg-type]
    assert found == ScaleCounts(groups=4, subnormal=1, zero=1)


def test_compressed_tensors_decodes_the_shard_to_the_projects_own_values(
    finished: SmallRun, tmp_path: Path
) -> None:
    """Bit for bit after the rounding to bf16 that compressed-tensors ends with."""
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    checkpoint = open_checkpoint(LocalStore(finished.checkpoint))
    unit = finished.prepared.plan.units[-1]
    manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
    shard = Shard.of(shard_bytes(finished.context, manifest), tmp_path)
    for expert in unit.experts:
        ours = compressed_expert(checkpoint, finished.context, unit.layer, expert)
        for projection, weight in zip(("gate_proj", "up_proj", "down_proj"), ours, strict=True):
            theirs = NVFP4PackedCompressor.decompress(
                shard.linear(unit.layer, expert, projection), scheme
            )["weight"]
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(theirs, weight.to(torch.bfloat16))


def test_claimed_weight_errors_are_those_of_the_stored_bytes(
    finished: SmallRun, source_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    for unit in finished.prepared.plan.units[::3]:
        manifest = UnitManifest.load(finished.prepared.store, run_root.unit_manifest(unit.id))
        shard = Shard.of(shard_bytes(finished.context, manifest), tmp_path)
        for record in manifest.linears:
            original = whole_model.decode_int4(source_tensors, record.name).double()
            expert, projection = record.name.split(".")[-2:]
            stored = decode_weights(shard.linear(unit.layer, int(expert), projection))
            expected = ((original - stored).square().sum() / original.square().sum()).item()
            assert record.relative_weight_error == pytest.approx(expected, rel=1e-5)
            assert 0.01 < expected < 0.6, "half of the pairs are gone, the rest is 4 bits wide"


def test_manifest_names_the_attempt_its_size_and_its_digest(finished: SmallRun) -> None:
    store = finished.prepared.store
    for unit in finished.prepared.plan.units:
        manifest = UnitManifest.load(store, run_root.unit_manifest(unit.id))
        data = store.get(f"units/{unit.id}/{manifest.attempt}/shard.safetensors")
        assert manifest.unit == unit.id
        assert manifest.units_digest == finished.prepared.plan.units_digest
        assert manifest.size_bytes == len(data)
        assert manifest.sha256 == hashlib.sha256(data).hexdigest()
        assert manifest.data_offset == 8 + int.from_bytes(data[:8], "little")
        names = [f"{PREFIX}.{unit.layer}.mlp.experts.{e}.{p}" for p in SHAPES for e in unit.experts]
        assert sorted(r.name for r in manifest.linears) == sorted(names)
        tokens = LayerScales.load(store, run_root.layer_scales(unit.layer)).tokens_per_expert
        assert all(r.tokens == tokens[int(r.name.split(".")[-2])] for r in manifest.linears)
        assert {r.outcome for r in manifest.linears} <= {"solved", "one_shot"}


def test_second_run_of_a_unit_leaves_the_first_manifest_and_no_second_shard(opened: Opener) -> None:
    context = opened()
    first = compress_unit(context, PAIR)
    stored = context.store.get(run_root.unit_manifest(PAIR.id))
    assert compress_unit(context, PAIR) == first
    assert context.store.get(run_root.unit_manifest(PAIR.id)) == stored
    assert [
        info.key for info in context.store.list("units/") if info.key.endswith("shard.safetensors")
    ] == [run_root.unit_shard(PAIR.id, first.attempt)]


@pytest.mark.parametrize("solver", ["block_descent", "sparsegpt_gptq", "round_to_nearest"])
def test_two_runs_of_a_unit_make_the_same_bytes(opened: Opener, solver: str) -> None:
    settings = (f"compression.solver={solver}",)
    assert compress(opened(*settings)) == compress(opened(*settings))


def test_unit_that_streams_its_tokens_makes_the_bytes_of_one_that_holds_them(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held in a file of the node, and read again from the parts where its disk has no room."""
    held = compress(opened())
    monkeypatch.setattr(routed_tokens, "GATHERED_BYTES", 0)
    assert compress(opened()) == held
    monkeypatch.setattr(routed_tokens, "reserve_spill", lambda *_: None)
    context = opened()
    assert routed_tokens.RoutedTokens(context, PAIR, context.layer_scales(1)).gathered is None
    assert compress(context) == held


@pytest.mark.parametrize(("span", "is_shared"), [(16, False), (32, True)])
def test_scales_are_shared_by_32_inputs_only_where_the_span_says_so(
    opened: Opener, tmp_path: Path, span: int, is_shared: bool
) -> None:
    shard = Shard.of(compress(opened(f"compression.scale_span={span}")), tmp_path)
    for expert in PAIR.experts:
        for projection in SHAPES:
            scale_OG = shard.linear(1, expert, projection)["weight_scale"].float()
            assert torch.equal(scale_OG[:, 0::2], scale_OG[:, 1::2]) is is_shared


# What the settings do


@pytest.mark.slow
def test_router_weight_exponent_changes_the_result(opened: Opener) -> None:
    results = {
        compress(opened(f"compression.router_weight_exponent={exponent}"))
        for exponent in (0.0, 1.0, 2.0)
    }
    assert len(results) == 3


def test_router_weight_exponent_means_nothing_where_all_router_weights_are_one(
    opened: Opener, layer_inputs: RoutedInputs
) -> None:
    seen = layer_inputs._replace(router_weights_TK=torch.ones_like(layer_inputs.router_weights_TK))
    first, second = (
        compress(opened(f"compression.router_weight_exponent={e}", seen=seen)) for e in (0.0, 2.0)
    )
    assert first == second


def test_raw_inputs_are_used_where_activation_quantization_is_off(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = compress(opened())

    def refuse(*_: object) -> None:
        raise AssertionError("nothing should be quantized")

    monkeypatch.setattr(routed_tokens, "quantize_activations", refuse)
    with pytest.raises(AssertionError, match="nothing should be quantized"):
        compress(opened())
    assert compress(opened("compression.activation_quantization=false")) != quantized


def test_activation_group_of_32_changes_the_result(opened: Opener) -> None:
    assert compress(opened("compression.activation_group=32")) != compress(opened())


# What the manifest says of the outputs


@dataclass
class TokenView:
    """Everything that one expert saw, token by token, in float64: x as the original and as the
    kernel sees it, token weights."""

    x_TH: Tensor
    xq_TH: Tensor
    weights_T: Tensor


def view(
    seen: RoutedInputs, expert: int | None, scale: float, is_quantized: bool, exponent: float = 2.0
) -> TokenView:
    """The tokens routed to an expert; None: every token of the layer, weight 1."""
    hidden_TH = seen.hidden_TH.float()
    quantized_TH = quantize_tokens(hidden_TH, scale) if is_quantized else hidden_TH
    if expert is None:
        return TokenView(
            hidden_TH.double(),
            quantized_TH.double(),
            torch.ones(len(hidden_TH), dtype=torch.float64),
        )
    rows, slots = torch.where(seen.expert_ids_TK == expert)
    weights_T = seen.router_weights_TK[rows, slots].double() ** exponent
    return TokenView(hidden_TH[rows].double(), quantized_TH[rows].double(), weights_T)


def swiglu(x_TH: Tensor, gate_FH: Tensor, up_FH: Tensor) -> Tensor:
    return F.silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T)


def mean_squared(rows_TO: Tensor, weights_T: Tensor) -> float:
    return ((rows_TO.square().sum(1) * weights_T).sum() / weights_T.sum()).item()


def down_sides(
    tokens: TokenView,
    originals: dict[str, Tensor],
    stored: dict[str, Tensor],
    scale: float,
    is_quantized: bool,
) -> tuple[float, float, float]:
    """(E|W h - Q h'|^2, E|W h|^2, mean square of h') by running every token through the expert,
    original and compressed."""
    h_TF = swiglu(tokens.x_TH, originals["gate_proj"], originals["up_proj"])
    raw_TF = swiglu(tokens.xq_TH, stored["gate_proj"], stored["up_proj"])
    hq_TF = quantize_tokens(raw_TF.float(), scale) if is_quantized else raw_TF
    target_TH, found_TH = h_TF @ originals["down_proj"].T, hq_TF @ stored["down_proj"].T
    return (
        mean_squared(target_TH - found_TH, tokens.weights_T),
        mean_squared(target_TH, tokens.weights_T),
        mean_squared(hq_TF, tokens.weights_T),
    )


def weights_of(
    shard: Shard, source_tensors: dict[str, Tensor], expert: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    originals = {
        p: whole_model.decode_int4(source_tensors, f"{PREFIX}.1.mlp.experts.{expert}.{p}").double()
        for p in SHAPES
    }
    return originals, {p: decode_weights(shard.linear(1, expert, p)) for p in SHAPES}


@pytest.mark.slow
@pytest.mark.parametrize("is_quantized", [True, False])
@pytest.mark.parametrize("half_tokens", [0.0, moments.DOWN_HALF_TOKENS])
def test_relative_output_errors_are_those_of_every_token_run_through_the_expert(
    opened: Opener,
    layer_inputs: RoutedInputs,
    source_tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_quantized: bool,
    half_tokens: float,
) -> None:
    """Weighted by router weight squared; with shrinkage s, own and layer's means are mixed (1 - s)
    to s, the layer's at the own size of h'."""
    monkeypatch.setattr(moments, "DOWN_HALF_TOKENS", half_tokens)
    monkeypatch.setattr(moments, "GATE_UP_HALF_TOKENS", 0.0)
    context = opened(f"compression.activation_quantization={str(is_quantized).lower()}")
    scales = context.layer_scales(1)
    manifest = compress_unit(context, PAIR)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for expert in PAIR.experts:
        originals, stored = weights_of(shard, source_tensors, expert)
        own = view(layer_inputs, expert, scales.gate_up, is_quantized)
        layer = view(layer_inputs, None, scales.gate_up, is_quantized)
        per_input = len(own.weights_T) / 128
        share = half_tokens / (half_tokens + per_input)
        error, energy, size = down_sides(own, originals, stored, scales.down, is_quantized)
        error_of_layer, energy_of_layer, size_of_layer = down_sides(
            layer, originals, stored, scales.down, is_quantized
        )
        ratio = size / size_of_layer
        expected = ((1 - share) * error + share * ratio * error_of_layer) / (
            (1 - share) * energy + share * ratio * energy_of_layer
        )
        record = record_of(manifest, expert, "down_proj")
        assert record.shrinkage == pytest.approx(share, rel=1e-6)
        assert record.relative_output_error == pytest.approx(expected, rel=1e-3)
        for projection in ("gate_proj", "up_proj"):  # both sides see what the kernel sees
            delta, whole = originals[projection] - stored[projection], originals[projection]
            ratio = mean_squared(own.xq_TH @ delta.T, own.weights_T) / mean_squared(
                own.xq_TH @ whole.T, own.weights_T
            )
            assert record_of(manifest, expert, projection).relative_output_error == pytest.approx(
                ratio, rel=1e-3
            )


# What gradients change

GRADIENTS = "compression.output_curvature=true"


@pytest.mark.slow
def test_gradients_change_the_result_and_the_same_ones_give_the_same_bytes(
    opened: Opener, random_delta: Tensor
) -> None:
    first = compress(opened(GRADIENTS))
    assert compress(opened(GRADIENTS)) == first
    assert compress(opened()) != first
    assert compress(opened(GRADIENTS, delta_TH=random_delta.flip(0))) != first


@pytest.mark.slow
def test_unit_that_streams_tokens_and_gradients_makes_the_bytes_of_one_that_holds_them(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits in (16, 8):
        settings = (GRADIENTS, f"calibration.stored_bits={bits}")
        held = compress(opened(*settings))
        with monkeypatch.context() as patch:
            patch.setattr(routed_tokens, "GATHERED_BYTES", 0)
            assert compress(opened(*settings)) == held
            patch.setattr(routed_tokens, "reserve_spill", lambda *_: None)
            assert compress(opened(*settings)) == held


@pytest.mark.parametrize(
    "gathered_bytes", [10**9, 0, 60_000], ids=["in memory", "in a file", "in both"]
)
@pytest.mark.parametrize("bits", [16, 8])
def test_a_unit_gathers_its_own_tokens_rows_in_the_parts_order(
    opened: Opener, bits: int, gathered_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert by expert, rows ascending: sums are taken in this order, and with it their last
    bits."""
    monkeypatch.setattr(routed_tokens, "GATHERED_BYTES", gathered_bytes)
    context = opened(GRADIENTS, f"calibration.stored_bits={bits}")
    expected = []
    for part in context.activation_parts(1):
        for position, expert in enumerate(PAIR.experts):
            rows_R, slots_R = torch.where(part["expert_ids"] == expert)
            rows = [
                part[name][rows_R]
                for name in ("hidden", "hidden_scale", "delta", "delta_scale")
                if name in part
            ]
            expected.append((position, part["router_weights"][rows_R, slots_R], rows))
    found = list(routed_tokens.RoutedTokens(context, PAIR, context.layer_scales(1)).stored())
    assert [s.position for s in found] == [position for position, _, _ in expected]
    for s, (_, router_R, rows) in zip(found, expected, strict=True):
        assert s.delta is not None
        taken = [
            t
            for t in (s.x.values_TH, s.x.scale_TG, s.delta.values_TH, s.delta.scale_TG)
            if t is not None
        ]
        assert torch.equal(s.router_T, router_R)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(taken, rows, strict=True))


@pytest.mark.parametrize("first", ["memory", "file"])
def test_rows_go_to_the_first_room_with_space_for_them(first: str, tmp_path: Path) -> None:
    """A small tensor still fits where a large one did not; none is cut."""
    source = torch.arange(600, dtype=torch.int32).view(100, 6)
    spill = token_columns.Spill(2048, tmp_path)
    host = token_columns.HostRoom(1024 if first == "memory" else None)
    rooms = token_columns.RoomsInOrder([host, spill] if first == "memory" else [spill, host])
    wanted = [torch.arange(n) for n in (30, 20, 10, 0, 40)]  # 720, 480, 240, 0, 960 bytes
    in_spill, found = [], []
    for rows_R in wanted:
        before = spill.end
        found.append(rooms.copy_rows(source, rows_R))
        in_spill.append(spill.end > before)
    rooms.synchronize()
    if first == "memory":
        assert in_spill == [False, True, False, False, True]
    else:
        assert in_spill == [True, True, True, False, False]
    for rows_R, rows in zip(wanted, found, strict=True):
        assert torch.equal(rows, source[rows_R])


def test_tokens_that_pass_the_memory_go_to_a_file_and_memory_does_not_grow(
    opened: Opener, layer_inputs: RoutedInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times the tokens of a unit whose share of the memory is its tokens once."""
    once = opened()
    sequences = once.plan.config.calibration.num_sequences
    counts = once.layer_scales(1).tokens_per_expert
    fits = sum(counts[e] for e in PAIR.experts) * routed_token_bytes(256, once.plan.config)
    monkeypatch.setattr(routed_tokens, "GATHERED_BYTES", 2 * fits)  # for one that is read ahead
    held, in_file = {}, {}
    for times in (1, 16):
        seen = RoutedInputs(*(t.repeat(times, 1) for t in layer_inputs[:3]), *layer_inputs[3:])
        context = opened(f"calibration.num_sequences={times * sequences}", seen=seen)
        files: list[token_columns.Spill | None] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                routed_tokens,
                "reserve_spill",
                lambda *asked, files=files: files.append(reserve_spill(*asked)) or files[-1],
            )
            tokens = routed_tokens.RoutedTokens(context, PAIR, context.layer_scales(1))
        assert tokens.gathered is not None
        mapped = [np.frombuffer(file.data, np.uint8) for file in files if file is not None]
        columns = [t for s in tokens.gathered for t in (s.x.values_TH, s.router_T)]
        is_mapped = [
            any(np.may_share_memory(t.view(torch.uint8).numpy(), m) for m in mapped)
            for t in columns
        ]
        held[times], in_file[times] = (
            sum(t.nbytes for t, there in zip(columns, is_mapped, strict=True) if there is wanted)
            for wanted in (False, True)
        )
    assert held[1] == fits and not in_file[1]
    assert 0.5 * fits < held[16] <= fits
    assert held[16] + in_file[16] == 16 * fits


@pytest.mark.parametrize("bits", [16, 8])
def test_tokens_of_a_unit_take_the_bytes_that_are_expected_and_parts_are_read_once(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """As codes where they are stored as codes; in a file of exactly the size that the layer's token
    counts give."""
    monkeypatch.setattr(routed_tokens, "GATHERED_BYTES", 0)
    context = opened(GRADIENTS, f"calibration.stored_bits={bits}", "compression.refine_steps=3")
    spills, reads = [], []
    reserve, read = routed_tokens.reserve_spill, StageContext.checked

    def reserved(
        num_bytes: int, num_tensors: int, folder: Path | None
    ) -> token_columns.Spill | None:
        spills.append((num_bytes, num_tensors, reserve(num_bytes, num_tensors, folder)))
        return spills[-1][2]

    monkeypatch.setattr(routed_tokens, "reserve_spill", reserved)
    monkeypatch.setattr(
        StageContext,
        "checked",
        lambda self, key, *rest: reads.append(key) or read(self, key, *rest),
    )
    compress(context)
    assert len(reads) == len(set(reads)) == 2 * len(context.plan.parts)
    ((expected, num_tensors, spill),) = spills
    counts = context.layer_scales(1).tokens_per_expert
    row = 256 * 2 if bits == 16 else 256 + 2 * 256 // 16
    assert expected == sum(counts[e] for e in PAIR.experts) * (2 * row + 4)
    assert expected <= spill.end <= expected + num_tensors * 64 == len(spill.data)


@pytest.mark.slow
def test_eight_bits_store_what_the_coder_makes_of_the_original_values_and_leave_scales_alone(
    opened: Opener, layer_inputs: RoutedInputs, random_delta: Tensor
) -> None:
    # not bf16 numbers
    wide = layer_inputs._replace(hidden_TH=layer_inputs.hidden_TH.float() * 1.001)
    coarse, fine = (
        opened(GRADIENTS, "calibration.stored_bits=8", seen=wide),
        opened(GRADIENTS, seen=wide),
    )
    assert coarse.layer_scales(1).gate_up == fine.layer_scales(1).gate_up
    parts = list(coarse.activation_parts(1))
    for name, original_TH in (("hidden", wide.hidden_TH), ("delta", random_delta)):
        rows = [token_columns.of_columns(part, name) for part in parts]
        assert {r.values_TH.dtype for r in rows} == {torch.int8}
        found_TH = torch.cat([r.decoded(torch.device("cpu")) for r in rows])
        assert torch.equal(found_TH, block_int8.decode(*block_int8.encode(original_TH)))
    assert compress(coarse) != compress(fine)


def test_eight_bits_refuse_activations_that_are_not_finite(
    opened: Opener, layer_inputs: RoutedInputs
) -> None:
    broken_TH = layer_inputs.hidden_TH.clone()
    broken_TH[3, 7] = float("inf")
    with pytest.raises(NumericsError, match="not"):
        opened("calibration.stored_bits=8", seen=layer_inputs._replace(hidden_TH=broken_TH))


def test_refinement_gathers_no_more_tokens_than_it_uses(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the plan's order, and nothing held beyond them."""
    context = opened("compression.refine_steps=1")
    tokens = routed_tokens.RoutedTokens(context, PAIR, context.layer_scales(1))
    side = moments.output_side(tokens, [])
    whole = refinement.gather_tokens(tokens, side, 2, 256)
    assert min(len(t.rows) for t in whole) > 40
    monkeypatch.setattr(refinement, "MAX_TOKENS", 40)
    for few, all_of_it in zip(refinement.gather_tokens(tokens, side, 2, 256), whole, strict=True):
        held = few.rows.values_TH
        assert torch.equal(held, all_of_it.rows.values_TH[:40]) and torch.equal(
            few.weight_T, all_of_it.weight_T[:40]
        )
        assert held.untyped_storage().nbytes() == held.nbytes


def test_tokens_weigh_by_the_norm_of_their_gradient_clipped_at_20_times_its_mean(
    opened: Opener,
    layer_inputs: RoutedInputs,
    source_tensors: dict[str, Tensor],
    random_delta: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen in down_proj's output error over the expert's own tokens; one token's gradient is beyond
    the clip."""
    monkeypatch.setattr(moments, "DOWN_HALF_TOKENS", 0.0)
    rows, slots = torch.where(layer_inputs.expert_ids_TK == 4)
    delta_TH = random_delta.clone()
    delta_TH[rows[3]] = 500.0
    context = opened(GRADIENTS, delta_TH=delta_TH)
    manifest = compress_unit(context, PAIR)
    originals, stored = weights_of(
        Shard.of(shard_bytes(context, manifest), tmp_path), source_tensors, 4
    )
    scales = context.layer_scales(1)
    norms_T = (
        delta_TH[rows].double() * layer_inputs.router_weights_TK[rows, slots, None].double()
    ).norm(dim=1)
    clipped_T = (norms_T / norms_T.mean()).clamp_max(20.0)
    assert int((clipped_T == 20).sum()) == 1
    own = replace(view(layer_inputs, 4, scales.gate_up, is_quantized=True), weights_T=clipped_T)
    error, energy, _ = down_sides(own, originals, stored, scales.down, is_quantized=True)
    assert record_of(manifest, 4, "down_proj").relative_output_error == pytest.approx(
        error / energy, rel=1e-3
    )


def test_expert_without_tokens_is_compressed_where_gradients_are_used(
    opened: Opener, uneven: RoutedInputs, tmp_path: Path
) -> None:
    context = opened(GRADIENTS, seen=uneven)
    manifest = compress_unit(context, TRIO)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for expert in TRIO.experts:
        for projection in SHAPES:
            linear = shard.linear(1, expert, projection)
            assert record_of(manifest, expert, projection).outcome in ("solved", "one_shot")
            assert (
                legal_patterns(linear["weight_packed"])
                and torch.isfinite(decode_weights(linear)).all()
            )
            assert record_of(manifest, expert, projection).relative_weight_error < 0.6


def test_gradients_that_are_all_zero_leave_legal_finite_weights(
    opened: Opener, random_delta: Tensor, tmp_path: Path
) -> None:
    context = opened(GRADIENTS, delta_TH=torch.zeros_like(random_delta))
    manifest = compress_unit(context, PAIR)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for record in manifest.linears:
        expert, projection = record.name.split(".")[-2:]
        assert legal_patterns(shard.linear(1, int(expert), projection)["weight_packed"])
        assert 0 < record.relative_weight_error < 0.6 and 0 < record.relative_output_error < 1


# Experts with few tokens or none

STARVED, RARE, BUSY = 4, 5, 6
TRIO = WorkUnit(layer=1, first_expert=4, num_experts=3)


@pytest.fixture
def uneven(layer_inputs: RoutedInputs) -> RoutedInputs:
    """The same tokens, routed so that expert 4 gets none, expert 5 three and expert 6 all 384."""
    ids_TK = torch.tensor([[BUSY, 0, 1, 2], [BUSY, 7, 8, 9]]).repeat(192, 1)
    ids_TK[[0, 100, 383], 1] = RARE
    return layer_inputs._replace(expert_ids_TK=ids_TK)


def legal_patterns(packed_OB: Tensor) -> bool:
    return bool(((packed_OB.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize("solver", ["block_descent", "sparsegpt_gptq", "round_to_nearest"])
def test_experts_with_few_tokens_or_none_are_compressed_with_the_layers_statistics(
    opened: Opener, uneven: RoutedInputs, tmp_path: Path, solver: str
) -> None:
    context = opened(f"compression.solver={solver}", seen=uneven)
    manifest = compress_unit(context, TRIO)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for expert, tokens in ((STARVED, 0), (RARE, 3), (BUSY, 384)):
        for projection in SHAPES:
            record, linear = (
                record_of(manifest, expert, projection),
                shard.linear(1, expert, projection),
            )
            assert (record.tokens, record.outcome, record.reason) == (tokens, "solved", "")
            assert (
                torch.isfinite(decode_weights(linear)).all()
                and decode_weights(linear).abs().max() > 0
            )
            assert (
                torch.isfinite(linear["weight_scale"].float()).all()
                and (linear["weight_scale"].float() > 0).all()
            )
            assert legal_patterns(linear["weight_packed"])
            assert 0 < record.relative_weight_error < 0.6
            assert 0 < record.relative_output_error < 1


def test_shrinkage_follows_from_the_token_count_and_is_in_the_manifest(
    opened: Opener, uneven: RoutedInputs
) -> None:
    manifest = compress_unit(opened(seen=uneven), TRIO)
    for projection, half, inputs in (
        ("gate_proj", 2.0, 256),
        ("up_proj", 2.0, 256),
        ("down_proj", 12.0, 128),
    ):
        found = {e: record_of(manifest, e, projection).shrinkage for e in TRIO.experts}
        assert found[STARVED] == 1
        assert found[RARE] == pytest.approx(half / (half + 3 / inputs))
        assert found[BUSY] == pytest.approx(half / (half + 384 / inputs))
        assert 0 < found[BUSY] < found[RARE] < 1


def test_one_shot_solver_borrows_only_for_experts_with_fewer_tokens_than_inputs(
    opened: Opener, uneven: RoutedInputs
) -> None:
    manifest = compress_unit(opened("compression.solver=sparsegpt_gptq", seen=uneven), TRIO)
    for projection in SHAPES:
        assert record_of(manifest, STARVED, projection).shrinkage == 1
        assert 0 < record_of(manifest, RARE, projection).shrinkage < 1
        assert record_of(manifest, BUSY, projection).shrinkage == 0
        assert record_of(manifest, BUSY, projection).damp == pytest.approx(0.1)


@pytest.mark.slow
def test_expert_without_tokens_takes_its_curvature_from_all_tokens_of_the_layer(
    opened: Opener, uneven: RoutedInputs
) -> None:
    """Another expert's routing does not matter to it, the layer's tokens do."""
    alone = WorkUnit(layer=1, first_expert=STARVED, num_experts=1)
    rerouted = uneven._replace(
        expert_ids_TK=torch.where(uneven.expert_ids_TK == 0, 3, uneven.expert_ids_TK)
    )
    assert compress(opened(seen=uneven), alone) == compress(opened(seen=rerouted), alone)
    halved = uneven._replace(hidden_TH=torch.cat([uneven.hidden_TH[:192]] * 2))
    assert compress(opened(seen=halved), alone) != compress(opened(seen=uneven), alone)


def test_expert_whose_tokens_all_weigh_nothing_is_rounded_and_says_so(
    opened: Opener, layer_inputs: RoutedInputs, tmp_path: Path
) -> None:
    weights_TK = torch.where(layer_inputs.expert_ids_TK == 4, 0.0, layer_inputs.router_weights_TK)
    context = opened(seen=layer_inputs._replace(router_weights_TK=weights_TK))
    manifest = compress_unit(context, PAIR)
    shard = Shard.of(shard_bytes(context, manifest), tmp_path)
    for projection in SHAPES:
        record = record_of(manifest, 4, projection)
        assert record.tokens > 0
        assert (record.outcome, record.reason) == ("round_to_nearest", "the Hessian is zero")
        assert record_of(manifest, 5, projection).outcome == "solved"
        assert legal_patterns(shard.linear(1, 4, projection)["weight_packed"])
        assert record.relative_weight_error < 0.6


# Activations that are not what they should be

PART = run_root.activation_part(1, 1)


def refused(context: StageContext, *words: str) -> None:
    with pytest.raises(ShardCorruptError) as caught:
        compress_unit(context, PAIR)
    for word in words:
        assert word in str(caught.value)
    assert list(context.store.list("units/")) == []


def test_scales_of_another_plan_are_refused_by_name(opened: Opener) -> None:
    context, other = opened(), opened("compression.sweeps=2")
    context.store.put(run_root.layer_scales(1), other.store.get(run_root.layer_scales(1)))
    refused(
        context,
        "activations/layer-001/scales.json",
        context.plan.units_digest[:12],
        other.plan.units_digest[:12],
    )


def test_activations_of_another_plan_are_refused_by_name(opened: Opener) -> None:
    context, other = opened(), opened("compression.sweeps=2")
    key = run_root.activation_manifest(1, 1)
    context.store.put(key, other.store.get(key))
    refused(
        context,
        "activations/layer-001/part-0001",
        context.plan.units_digest[:12],
        other.plan.units_digest[:12],
    )


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_activations_are_refused_by_name(opened: Opener, kept: int) -> None:
    context = opened()
    context.store.put(PART, context.store.get(PART)[:kept])
    refused(context, PART)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.95, 0.9999])
def test_activations_with_one_wrong_byte_are_refused_by_name(opened: Opener, share: float) -> None:
    """Anywhere: magic, schema, hidden states, ids, router weights, footer."""
    context = opened()
    data = bytearray(context.store.get(PART))
    data[int(share * len(data))] ^= 0x10
    context.store.put(PART, bytes(data))
    refused(context, PART)


def test_activations_that_are_another_parts_are_refused_by_name(opened: Opener) -> None:
    context = opened()
    context.store.put(PART, context.store.get(run_root.activation_part(1, 0)))
    refused(context, PART)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999])
def test_gradients_with_one_wrong_byte_are_refused_by_name(opened: Opener, share: float) -> None:
    context = opened(GRADIENTS)
    key = run_root.gradient_part(1, 2)
    data = bytearray(context.store.get(key))
    data[int(share * len(data))] ^= 0x10
    context.store.put(key, bytes(data))
    refused(context, key)


def test_absent_gradients_are_named(opened: Opener) -> None:
    context = opened(GRADIENTS)
    context.store.delete(run_root.gradient_part(1, 0))
    with pytest.raises(CorruptObjectError, match=run_root.gradient_part(1, 0)) as caught:
        compress_unit(context, PAIR)
    assert caught.value.keys == (run_root.gradient_manifest(1, 0), run_root.gradient_part(1, 0))


def test_absent_activations_are_named(opened: Opener) -> None:
    context = opened()
    context.store.delete(PART)
    with pytest.raises(CorruptObjectError, match=PART) as caught:
        compress_unit(context, PAIR)
    assert caught.value.keys == (PART.replace(".arrow", ".json"), PART)
