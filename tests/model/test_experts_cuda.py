"""The mixture on a GPU: fused steps against the torch code that defines them, and experts that
arrive while others compute."""

import mmap
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p48ray.model import experts as module
from p48ray.model.expert_loader import ExpertLoader
from p48ray.model.experts import ExpertWeights, RoutedCall, RoutedExperts, RoutedInputs
from p48ray.model.pinned_pages import PinnedPages
from p48ray.unit.staging import PIECE_BYTES, PIECES, Staging, to_device
from p48ray.unit.token_columns import DeviceRoom

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_EXPERTS, HIDDEN, SIZE, TOP_K = 12, 512, 192, 4  # 192 is no power of two


def weights_on_gpu(is_stacked: bool) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(NUM_EXPERTS):
        gate_up = (0.1 * torch.randn(2 * SIZE, HIDDEN, generator=generator)).bfloat16().cuda()
        down = (0.1 * torch.randn(HIDDEN, SIZE, generator=generator)).bfloat16().cuda()
        gate, up = (
            gate_up.split(SIZE) if is_stacked else (gate_up[:SIZE].clone(), gate_up[SIZE:].clone())
        )
        made.append(ExpertWeights(gate, up, down))
    return made


def call_of(tokens: int, seed: int) -> tuple[RoutedCall, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = 1 + torch.rand(tokens, NUM_EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    x_TH, g_TH = (
        torch.randn(tokens, HIDDEN, generator=generator),
        1e-3 * torch.randn(tokens, HIDDEN, generator=generator),
    )
    call = RoutedCall(
        x_TH.bfloat16().cuda(),
        ids_TK.cuda(),
        (torch.rand(tokens, TOP_K, generator=generator) + 0.1).cuda(),
    )
    return call, g_TH.bfloat16().cuda()


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("is_stacked", [True, False])
def test_fused_steps_are_the_torch_code(is_stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = weights_on_gpu(is_stacked), []
    calls = [call_of(300, 1), call_of(17, 2)]

    def run(is_fused: bool) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[float]]:
        monkeypatch.setattr(module, "is_fused", lambda calls: is_fused)
        seen: list[RoutedInputs] = []
        experts = RoutedExperts(NUM_EXPERTS, weights.__getitem__, observe=seen.append)
        outs = experts.outputs([call for call, _ in calls])
        return (
            outs,
            experts.gradients([c for c, _ in calls], [g for _, g in calls]),
            [a for s in seen for a in s.amax_by_expert_E.tolist()],
        )

    ours, theirs, again = run(True), run(False), run(True)
    for a, b in zip(ours[0], theirs[0], strict=True):
        # bf16 rounds at 2e-3; products of other shapes add in another order
        assert relative_gap(a, b) < 4e-3
    for (a, aw), (b, bw) in zip(ours[1], theirs[1], strict=True):
        assert relative_gap(a, b) < 8e-3 and relative_gap(aw, bw) < 8e-3
    assert ours[2] == pytest.approx(theirs[2], rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], again[0], strict=True)), (
        "the same every time"
    )
    assert all(
        torch.equal(a, b)
        for x, y in zip(ours[1], again[1], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not seen


def test_gradients_are_float64_autograds_within_bf16() -> None:
    weights = weights_on_gpu(True)
    call, gradient_TH = call_of(200, 3)
    at_inputs, at_router = RoutedExperts(NUM_EXPERTS, weights.__getitem__).gradients(
        [call], [gradient_TH]
    )[0]
    exact = [ExpertWeights(*(w.double() for w in expert)) for expert in weights]
    x_TH, router_TK = (
        call.hidden_TH.double().requires_grad_(True),
        call.router_weights_TK.double().requires_grad_(True),
    )
    out = RoutedExperts(NUM_EXPERTS, exact.__getitem__)(x_TH, call.expert_ids_TK, router_TK)
    expected = torch.autograd.grad(out, (x_TH, router_TK), gradient_TH.double())
    assert (
        relative_gap(at_inputs, expected[0]) < 1e-2 and relative_gap(at_router, expected[1]) < 1e-2
    )


def test_experts_arrive_whole_whatever_is_skipped() -> None:
    """More experts than slots, asked for with gaps and twice, while the device is kept busy."""
    stored = [{"w": torch.full((64, 1024), float(e)), "n": torch.tensor([e])} for e in range(40)]
    loader = ExpertLoader(
        40,
        stored.__getitem__,
        lambda e, t: ExpertWeights(t["w"].clone(), t["n"].clone(), t["w"][:1].clone()),
        torch.device("cuda"),
    )
    with loader:
        ask(loader)


def ask(loader: ExpertLoader) -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    for asked in ([*range(40)], [0, 1, 9, 10, 11, 30, 39], [*range(0, 40, 3)], [5, 2, 38]):
        got = []
        for expert in asked:
            busy = busy @ busy * 1e-2
            got.append(loader(expert))
        for expert, weights in zip(asked, got, strict=True):
            assert (weights.gate_FH == expert).all() and weights.up_FH.item() == expert, expert


def mapped_tensors(path: Path, sizes: list[int]) -> list[Tensor]:
    """Tensors side by side on a mapped file, as a layer's lie in a safetensors file: none begins or
    ends with a page."""
    generator = torch.Generator().manual_seed(5)
    path.write_bytes(
        torch.randint(256, (sum(sizes),), generator=generator, dtype=torch.uint8).numpy().tobytes()
    )
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [
            torch.frombuffer(mapped, dtype=torch.uint8, count=n, offset=at)
            for at, n in zip(starts, sizes, strict=True)
        ]


def loader_of(stored: list[Tensor]) -> ExpertLoader:
    return ExpertLoader(
        len(stored),
        [{"w": t} for t in stored].__getitem__,
        lambda e, t: ExpertWeights(t["w"].clone(), t["w"], t["w"]),
        torch.device("cuda"),
    )


def test_pages_are_pinned_while_the_loader_is_open(tmp_path: Path) -> None:
    """Tensors on a mapped file, as a run has them; and again after the first loader is closed."""
    stored = mapped_tensors(tmp_path / "weights", [2**18 + 1] * 8)
    for _ in range(2):
        with loader_of(stored) as loader:
            assert stored[3].is_pinned()
            for expert in range(8):
                assert torch.equal(loader(expert).gate_FH.cpu(), stored[expert])
        assert not stored[3].is_pinned()
        assert stored[3].cuda().sum() == stored[3].sum()


@pytest.mark.parametrize("size", [100, 5000, 3 * 2**20 + 7])
def test_neighbours_of_pinned_tensors_are_copied_as_ever(size: int, tmp_path: Path) -> None:
    """The order that safetensors writes: a layer's router right behind its last expert, its norms
    before the first. CUDA refuses a copy from memory of which one end is pinned. Sizes: within a
    page, over a page, larger than the gaps that are pinned along."""
    before, *experts, between, last, after = mapped_tensors(
        tmp_path / "weights", [size, *[2**20 + 4099] * 6, size, 2**20 + 13, size]
    )
    with loader_of([*experts, last]) as loader:
        for tensor in (before, between, after):
            assert torch.equal(tensor.cuda().cpu(), tensor)
            assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), tensor)
        for expert, tensor in enumerate([*experts, last]):
            assert torch.equal(loader(expert).gate_FH.cpu(), tensor)


def test_pages_that_are_pinned_already_are_copied_by_another_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Part of them, by somebody else: no copy may meet its end. And CUDA's complaint is nobody
    else's."""
    stored = mapped_tensors(tmp_path / "weights", [2**18 + 1] * 8)
    with PinnedPages(stored[2:4], torch.device("cuda")), loader_of(stored) as loader:
        assert "cannot be pinned" in caplog.text
        (torch.ones(3, device="cuda") * 2).sum().item()
        for expert in range(8):
            assert torch.equal(loader(expert).gate_FH.cpu(), stored[expert])


def test_a_mapped_file_goes_to_the_device_and_nothing_stays_pinned(tmp_path: Path) -> None:
    first, second = mapped_tensors(tmp_path / "values", [10 * 2**20 + 3, 5 * 2**20])
    found = to_device({"a": first, "b": second}, torch.device("cuda"))
    assert torch.equal(found["a"].cpu(), first) and torch.equal(found["b"].cpu(), second)
    assert not first.is_pinned()


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 5 * PIECE_BYTES + 17])
def test_a_tensor_leaves_the_device_as_it_was_when_it_was_ready(num_bytes: int) -> None:
    """While the device is busy making it, several in turn through the same pinned memory, one of
    them given up."""
    staging, device = Staging(torch.device("cuda")), torch.device("cuda")
    for seed in range(3):
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(10):
            busy = busy @ busy * 1e-2
        made = (torch.arange(num_bytes, device=device) * (seed + 3) + busy.isnan().sum()).to(
            torch.uint8
        )
        ready = torch.cuda.Event()
        ready.record()
        if seed == 1:
            next(staging.pieces(made, ready), None)
            continue
        left = b"".join(bytes(piece) for piece in staging.pieces(made, ready))
        assert left == (torch.arange(num_bytes) * (seed + 3)).to(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("width", "dtype"), [(7168, torch.int8), (448, torch.bfloat16), (1, torch.float32)]
)
def test_rows_are_gathered_into_a_room_on_the_device(width: int, dtype: torch.dtype) -> None:
    tokens = max(3, min(20000, 2 * PIECES * PIECE_BYTES // (width * dtype.itemsize)))
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(-100, 100, (tokens, width), generator=generator).to(dtype)
    room = DeviceRoom(3 * source.nbytes, 3, torch.device("cuda"))
    picks = [
        torch.randperm(tokens, generator=generator),
        torch.arange(0, tokens, 3),
        torch.tensor([tokens - 1, 0, 0]),
    ]
    taken = [room.copy_rows(source, rows) for rows in picks]
    room.synchronize()
    for rows, there in zip(picks, taken, strict=True):
        assert torch.equal(there.cpu(), source[rows])
