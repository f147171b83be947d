"""Values that are not finite outside the experts: refused before anything is made, all at once, and
by the same command no more once they are mended."""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import open_checkpoint
from p48ray.checkpoint.tensors import tensor_bytes
from p48ray.finished.verifier import verify_folder
from p48ray.report.status import read_status
from p48ray.run.doctor import diagnose
from p48ray.stages import read_ahead, scan
from p48ray.stages.scan import find_not_finite
from p48ray.store import LocalStore, MemoryStore
from tests.jobs.command import Outcome, arguments, invoke
from tests.reference import tiny_families

NAN_BF16, INF_BF16, MINUS_INF_BF16 = b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"
NAN_FP8 = b"\xff"
INF_F32, MINUS_INF_F32 = b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"
NAN_F16 = b"\x00\x7e"


@dataclass(frozen=True)
class Plant:
    """Bytes at an index of a tensor; `words`: what the error says of it."""

    tensor: str
    index: tuple[int, ...]
    data: bytes
    words: str


# eh_proj: of the layer of multi-token prediction, which no text is run through
DEEPSEEK = (
    Plant("lm_head.weight", (2047, 191), NAN_BF16, "(BF16 [2048, 192]): 1 NaN, the first at"),
    Plant("model.layers.3.eh_proj.weight", (0, 5), MINUS_INF_BF16, "1 -inf, the first at [0, 5]"),
    Plant("model.layers.0.self_attn.o_proj.weight", (1, 2), NAN_FP8, "(F8_E4M3 [192, 128]): 1 NaN"),
    Plant("model.layers.0.self_attn.o_proj.weight_scale_inv", (1, 0), INF_F32, "1 inf"),
    Plant("model.layers.2.mlp.gate.e_score_correction_bias", (3,), INF_F32, "1 inf, the first"),
)
# a row of the embedding that the texts have no token of; what no text is run through
KIMI = (
    Plant("language_model.model.embed_tokens.weight", (2040, 0), INF_BF16, "1 inf"),
    Plant("language_model.lm_head.weight", (1000, 100), NAN_BF16, "first at [1000, 100]"),
    Plant("vision_tower.half", (7,), NAN_F16, "(F16 [40]): 1 NaN, the first at [7]"),
)


def entry_of(source: Path, tensor: str) -> TensorEntry:
    return open_checkpoint(LocalStore(source)).tensors[tensor]


def write(source: Path, plant: Plant) -> bytes:
    """Returns what was there."""
    entry = entry_of(source, plant.tensor)
    flat = 0
    for at, size in zip(plant.index, entry.shape, strict=True):
        flat = flat * size + at
    with (source / entry.file).open("r+b") as file:
        file.seek(entry.start + flat * len(plant.data))
        before = file.read(len(plant.data))
        file.seek(entry.start + flat * len(plant.data))
        file.write(plant.data)
    return before


def with_half(name: str, folder: Path) -> Path:
    """A release with one tensor in half precision too, as some vision towers are."""
    source = tiny_families.write_release(name, folder)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    save_file(
        {"vision_tower.half": torch.ones(40, dtype=torch.float16)}, source / "half.safetensors"
    )
    index["weight_map"]["vision_tower.half"] = "half.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


def command(source: Path, root: Path, on_ray: bool = False, **more: str) -> Outcome:
    settings = {"source.checkpoint": str(source), "compression.solver": "round_to_nearest"}
    return invoke(*arguments(root, settings | more), on_ray=on_ray)


def assert_refused(outcome: Outcome, source: Path, root: Path, plants: tuple[Plant, ...]) -> None:
    """One error that names every tensor, its file, counts and place; nothing was made."""
    assert outcome.code == 2, outcome
    assert f"not finite in {len(plants)} tensors" in outcome.err
    assert "run the same command again" in outcome.err
    lines = [line for line in outcome.err.splitlines() if ": tensor " in line]
    assert len(lines) == len(plants)
    for plant in plants:
        (line,) = (line for line in lines if f"tensor {plant.tensor} (" in line)
        assert entry_of(source, plant.tensor).file in line and plant.words in line
    for made in ("activations", "residuals", "units", "checkpoint"):
        assert not (root / made).exists()


def scans(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "scan").glob("*.json")}


@pytest.mark.slow
def test_all_are_named_at_once_and_the_same_command_goes_on_once_they_are_mended(
    tmp_path: Path,
) -> None:
    """The ends of files are in the source's fingerprint, so that it is another one once it is
    mended."""
    source, root = tiny_families.write_release("deepseek_v3", tmp_path / "source"), tmp_path / "run"
    before = {plant: write(source, plant) for plant in DEEPSEEK}
    assert_refused(command(source, root), source, root, DEEPSEEK)
    first = scans(root)
    assert len(first) == 3
    assert_refused(command(source, root), source, root, DEEPSEEK)
    bad = {entry_of(source, plant.tensor).file.replace("safetensors", "json") for plant in DEEPSEEK}
    kept = {name for name, data in scans(root).items() if data == first[name]}
    assert kept == first.keys() - bad, "a file that is sound is read once"
    plan = json.loads((root / "plan.json").read_text())
    for plant, data in before.items():
        write(source, Plant(plant.tensor, plant.index, data, ""))
    outcome = command(source, root)
    assert outcome.code == 0, outcome
    mended = json.loads((root / "plan.json").read_text())
    assert plan["source"]["fingerprint"] != mended["source"]["fingerprint"], "the test's own claim"
    assert "its source is mended" in outcome.out
    assert (root / "checkpoint" / "model.safetensors.index.json").exists()
    assert "corrupt" not in outcome.out + outcome.err and not (root / "failures").exists()


def test_vision_tower_embedding_row_and_head_are_looked_at(tmp_path: Path) -> None:
    source, root = with_half("kimi_k25", tmp_path / "source"), tmp_path / "run"
    for plant in KIMI:
        write(source, plant)
    outcome = command(source, root)
    assert_refused(outcome, source, root, KIMI)
    assert "scan" in outcome.out and "files of the source" in outcome.out
    store = LocalStore(root)
    (status,) = (stage for stage in read_status(store).stages if stage.stage == "scan")
    assert (status.done, status.total) == (4, 4)
    assert diagnose(store).unsound == ()
    said = json.loads(store.get("scan/half.json"))
    store.put("scan/half.json", json.dumps(said | {"file": "other.safetensors"}).encode())
    (found,) = diagnose(store).unsound
    assert found.delete == ("scan/half.json",) and "other.safetensors" in found.problem


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_on_ray_all_are_named_at_once(tmp_path: Path) -> None:
    source, root = with_half("kimi_k25", tmp_path / "source"), tmp_path / "run"
    for plant in KIMI:
        write(source, plant)
    assert_refused(command(source, root, on_ray=True), source, root, KIMI)


@pytest.mark.slow
def test_minus_infinity_in_a_routers_bias_is_said_and_passes(tmp_path: Path) -> None:
    """An expert that is never chosen: the log, the report and `p48ray verify` say so, and it is in
    the output as it was."""
    source, root = tiny_families.write_release("deepseek_v3", tmp_path / "source"), tmp_path / "run"
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    write(source, Plant(name, (6,), MINUS_INF_F32, ""))
    outcome = command(source, root)
    assert outcome.code == 0, outcome
    words = f"tensor {name} (F32 [8]): 1 -inf, the first at [6]"
    assert words in outcome.out
    report = json.loads((root / "report" / "report.json").read_text())
    (note,) = report["source_notes"]
    assert words in note and "never chooses" in note
    assert words in (root / "report" / "report.html").read_text()
    for other in (LocalStore(source), None):
        verdict = verify_folder(LocalStore(root / "checkpoint"), other)
        assert verdict.problems == ()
        assert [n for n in verdict.notes if f"{name}: holds 1 -inf, the first at [6]" in n]
        assert len(verdict.notes) == 1


def random_tensors(draw: torch.Generator) -> dict[str, Tensor]:
    """Of many sizes around a chunk's, some with a value that is not finite."""
    found = {}
    for number in range(60):
        size = int(torch.randint(0, 400, (), generator=draw))
        values = torch.randn(size, generator=draw).to(
            (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        )
        if size and number % 4 == 0:
            values[int(torch.randint(0, size, (), generator=draw))] = torch.nan
        found[f"t{number}"] = values
    return found


@pytest.mark.parametrize("chunk_bytes", [64, 256, 2**20])
def test_pieces_of_any_size_find_the_same(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that are read together, tensors in chunks, gaps between them."""
    for module in (read_ahead, scan):
        monkeypatch.setattr(module, "COMPARE_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(read_ahead, "INLINE_BYTES", 0)
    tensors = random_tensors(torch.Generator().manual_seed(5))
    store, entries, data = MemoryStore(uuid.uuid4().hex), [], b""
    for name, tensor in tensors.items():
        dtype = {4: "F32", 2: "BF16"}[tensor.dtype.itemsize]
        dtype = "F16" if tensor.dtype == torch.float16 else dtype
        raw = tensor_bytes(tensor)
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), "f", len(data), len(raw)))
        data += raw + b"\xff" * 8  # a gap; whoever read it as values would find NaN
    store.put("f", data)
    found = {entry.name: bad for entry, bad in find_not_finite(store, entries)}
    expected = {
        name: tuple(torch.nonzero(tensor.isnan())[0].tolist())
        for name, tensor in tensors.items()
        if tensor.isnan().any()
    }
    assert len(expected) > 10
    assert {name: bad.first for name, bad in found.items()} == expected
    assert {bad.num_nan for bad in found.values()} == {1}


def test_run_root_with_work_in_it_or_of_other_settings_stays_with_its_source(
    tmp_path: Path,
) -> None:
    """Only a run root in which nothing was made goes over to a mended source, and only by the same
    command."""
    source, root = tiny_families.write_release("deepseek_v3", tmp_path / "source"), tmp_path / "run"
    before = {plant: write(source, plant) for plant in DEEPSEEK}
    assert command(source, root).code == 2
    for plant, data in before.items():
        write(source, Plant(plant.tensor, plant.index, data, ""))
    outcome = command(source, root, **{"calibration.seed": "5"})
    assert outcome.code == 2 and "belongs to another plan: calibration.seed" in outcome.err
    LocalStore(root).put("units/L001-E000-003/manifest.json", b"{}")
    outcome = command(source, root)
    assert outcome.code == 2 and "belongs to another plan: source fingerprint" in outcome.err
