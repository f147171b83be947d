"""One layer of Kimi-K2.5's width through the streaming stages' own code, up and back down, against
what the device could do at best.

    python bench/capture.py --json capture.json
        on a GPU: 384 experts, 131,072 tokens in parts of 32,768
    python bench/capture.py --experts 8 --sequences 2 --length 128 --parts 1
        something for a laptop

The layer's weights are random, written once as a checkpoint in the release's layout (9.7 GB for 384
experts) and then read as a run reads them: mapped, packed, decoded when an expert is met. Routing
is the model's own router on random inputs.

Floors: FLOP at the rate of a large bf16 matrix product on this device (float32 on a CPU), and the
packed bytes at the rate of pinned copies to it.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.wide_checkpoint import random_tensor, skeleton_sizes, write_shard
from p48ray.checkpoint import skeleton
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import open_checkpoint
from p48ray.checkpoint.skeleton import Spec
from p48ray.checkpoint.tensors import tensor_bytes
from p48ray.model.decoder import Decoder, attend, mix
from p48ray.model.expert_loader import layer_experts
from p48ray.model.experts import RoutedExperts
from p48ray.stages.derivatives import step_back
from p48ray.store.local import LocalStore

VOCAB = 256  # embedding and head are not what is measured
TOP_K = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One direction. `flop` is what was multiplied, recomputation included."""

    seconds: float
    tokens_per_s: float
    flop: float
    matmul_share: float
    peak_bytes: int


def write_layer(folder: Path, num_experts: int) -> None:
    """A checkpoint of one layer, a mixture, in Kimi-K2.5's shapes. The same random words serve
    every expert: what they say does not matter here."""
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[str, str, tuple[int, ...]], bytes] = {}

    def make(spec: Spec) -> bytes:
        name, dtype, shape = spec
        key = (".".join(name.split(".")[-2:]), dtype, shape)
        if key not in made or ".experts." not in name:
            made[key] = tensor_bytes(random_tensor(spec, generator))
        return made[key]

    with skeleton_sizes(NUM_EXPERTS=num_experts, NUM_LAYERS=1, VOCAB=VOCAB):
        config = skeleton.kimi_k25_config()
        layer = [
            (name.replace("layers.1.", "layers.0."), dtype, shape)
            for name, dtype, shape in skeleton.layer_specs(1)
        ]
    config["text_config"] |= {"first_k_dense_replace": 0} | dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), 0
    )
    (folder / "config.json").write_text(json.dumps(config))
    ends = {
        "model.embed_tokens": (VOCAB, skeleton.HIDDEN),
        "model.norm": (skeleton.HIDDEN,),
        "lm_head": (VOCAB, skeleton.HIDDEN),
    }
    specs = [
        *layer,
        *((f"language_model.{name}.weight", "BF16", shape) for name, shape in ends.items()),
    ]
    write_shard(folder / "model.safetensors", specs, make)


def flop_per_token(length: int, num_experts: int, direction: str) -> float:
    """Multiply-adds times two, that the code makes for one token. Up: every product once. Back:
    attention forward twice and backward once with respect to its inputs, the experts' gate and up
    forward and all three back, router and shared expert twice forward and once back."""
    h, f = skeleton.HIDDEN, skeleton.MOE_INTERMEDIATE
    heads, nope, rope, v = skeleton.HEADS, skeleton.NOPE, skeleton.ROPE, skeleton.V_HEAD
    linears = (
        h * skeleton.Q_LORA
        + skeleton.Q_LORA * heads * (nope + rope)
        + h * (skeleton.KV_LORA + rope)
    )
    linears += skeleton.KV_LORA * heads * (nope + v) + heads * v * h
    scores = length / 2 * heads * (nope + rope + v)
    block, router, expert = 3 * h * f, h * num_experts, h * f
    if direction == "up":
        return 2.0 * (linears + scores + block + router + TOP_K * 3 * expert)
    return 2.0 * (3 * linears + 4.5 * scores + 3 * (block + router) + TOP_K * 5 * expert)


def timed(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[(repeats - 1) // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    repeats = 20 if device.type == "cuda" else 3
    return repeats * 2.0 * size**3 / timed(lambda: [a @ b for _ in range(repeats)], device, 3)


def copy_rate(device: torch.device) -> float | None:
    """Bytes a second from pinned memory to the device."""
    if device.type != "cuda":
        return None
    host, there = (
        torch.empty(2**28, dtype=torch.uint8, pin_memory=True),
        torch.empty(2**28, dtype=torch.uint8, device=device),
    )
    return float(2**28 / timed(lambda: there.copy_(host, non_blocking=True), device, 5))


def peak_bytes(device: torch.device) -> int:
    """Of the device, or of this process, mapped files included."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


class LayerBench:
    """The layer, its inputs, and both directions.

    Args:
        dtype: the stages' compute dtype.
        parts, sequences, length: what one worker holds, and how the plan cuts it.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        parts: int,
        sequences: int,
        length: int,
    ) -> None:
        index = open_checkpoint(LocalStore(folder))
        self.layout = describe_model(index)
        self.decoder = Decoder(index, self.layout, device, dtype)
        self.opened = ExitStack()
        experts = self.opened.enter_context(layer_experts(self.decoder, 0))
        self.experts = RoutedExperts(self.layout.num_experts, experts)
        self.layer = self.decoder.layer(0, self.experts)
        self.positions = self.decoder.positions(length)
        generator = torch.Generator(device=device).manual_seed(1)
        shape = (sequences, length, skeleton.HIDDEN)
        self.entering = [
            torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
            for _ in range(parts)
        ]
        self.above = [
            1e-3
            * torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
            for _ in range(parts)
        ]
        self.tokens, self.length = parts * sequences * length, length

    @torch.no_grad()
    def up(self) -> list[Tensor]:
        return mix(self.layer, [attend(self.layer, x, self.positions, 1) for x in self.entering])

    @torch.no_grad()
    def back(self) -> list[Tensor]:
        return step_back(self.layer, self.entering, self.above, self.positions, 1)

    @torch.no_grad()
    def load_all(self) -> None:
        for expert in range(self.layout.num_experts):
            self.experts.weights(expert)

    def measure(self, direction: str, rate: float, repeats: int) -> Measured:
        device = self.decoder.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(self.up if direction == "up" else self.back, device, repeats)
        flop = self.tokens * flop_per_token(self.length, self.layout.num_experts, direction)
        return Measured(
            seconds, self.tokens / seconds, flop, flop / seconds / rate, peak_bytes(device)
        )


def decode_seconds(bench: LayerBench, repeats: int) -> float:
    """Of all experts, from packed tensors on the device to weights."""
    from p48ray.numerics.int4 import decode_int4

    device = bench.decoder.device
    stored = bench.decoder.reader.tensors(0)
    names = [
        n.removesuffix(".weight_packed")
        for n in bench.layout.expert_tensor_names(0, 0)
        if n.endswith(".weight_packed")
    ]
    packed = [
        (stored[f"{n}.weight_packed"].to(device), stored[f"{n}.weight_scale"].to(device))
        for n in names
    ]
    rounds = 20 if device.type == "cuda" else 1
    return (
        bench.layout.num_experts
        / rounds
        * timed(lambda: [decode_int4(*p) for _ in range(rounds) for p in packed], device, repeats)
    )


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    write_layer(folder, args.experts)
    rate, copies = matmul_rate(device, dtype), copy_rate(device)
    bench = LayerBench(folder, device, dtype, args.parts, args.sequences, args.length)
    packed = sum(
        t.nbytes
        for n, t in bench.decoder.reader.tensors(0).items()
        if bench.layout.is_expert_tensor(n)
    )
    facts: dict[str, Any] = {
        "device": (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        ),
        "torch": torch.__version__,
        "experts": args.experts,
        "tokens": bench.tokens,
        "parts": args.parts,
        "length": args.length,
        "dtype": args.dtype,
        "packed_bytes": packed,
        "matmul_tflops": rate / 1e12,
        "copy_floor_s": packed / copies if copies else None,
        "load_s": timed(bench.load_all, device, args.repeats),
        "decode_s": decode_seconds(bench, args.repeats),
    }
    for direction in ("up", "back"):
        facts[direction] = asdict(bench.measure(direction, rate, args.repeats))
        facts[direction]["decode_share"] = facts["decode_s"] / facts[direction]["seconds"]
    return facts


def tell(
    run: Callable[[argparse.Namespace, Path], dict[str, Any]], args: argparse.Namespace
) -> None:
    """What a run found in a folder that goes afterwards: printed, and written where --json says."""
    with tempfile.TemporaryDirectory(prefix="p48ray-bench-") as folder:
        facts = run(args, Path(folder))
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--experts", type=int, default=skeleton.NUM_EXPERTS)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8, help="of a part")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tell(run, args)


if __name__ == "__main__":
    main()
