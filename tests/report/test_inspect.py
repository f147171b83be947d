"""One linear up close, counted again from its stored bytes."""

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor

from p48ray.errors import ConfigError, SourceError
from p48ray.report.inspect import Inspection, inspect_linear, print_inspection
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.store import LocalStore, MemoryStore
from tests.conftest import TINY
from tests.reference import formats
from tests.stages.damage import Folder
from tests.stages.small_run import SmallRun

NAME = "language_model.model.layers.2.mlp.experts.7.down_proj"
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


@pytest.fixture(scope="module")
def clean(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


@pytest.fixture(scope="module")
def linear(clean: Folder) -> dict[str, Tensor]:
    return {s: clean.tensors(clean.file_of(f"{NAME}.{s}"))[f"{NAME}.{s}"] for s in SUFFIXES}


@pytest.fixture(scope="module")
def found(finished: SmallRun) -> Inspection:
    return inspect_linear(LocalStore(finished.checkpoint), NAME, LocalStore(finished.source))


def test_inspection_names_the_linear_its_shape_and_both_globals(
    found: Inspection, linear: dict[str, Tensor]
) -> None:
    assert (found.name, found.shape) == (NAME, (256, 128))
    assert found.weight_global_scale == linear["weight_global_scale"].item()
    assert found.input_global_scale == linear["input_global_scale"].item()


def test_patterns_are_counted_once_per_group_of_eight_inputs(
    found: Inspection, linear: dict[str, Tensor]
) -> None:
    """A group with fewer than two nonzero bytes counts its lowest zero bytes as kept."""
    expected = dict.fromkeys(("xx..", "x.x.", "x..x", ".xx.", ".x.x", "..xx"), 0)
    for group in linear["weight_packed"].reshape(-1, 4).tolist():
        kept = [i for i, byte in enumerate(group) if byte]
        kept += [i for i in range(4) if i not in kept][: 2 - len(kept)]
        expected["".join("x" if i in kept else "." for i in range(4))] += 1
    assert found.patterns == expected
    assert sum(found.patterns.values()) == 256 * 128 // 8
    assert found.illegal_groups == 0


def test_scales_are_counted_by_their_power_of_two(
    found: Inspection, linear: dict[str, Tensor]
) -> None:
    values = (
        torch.tensor(formats.e4m3_values())[linear["weight_scale"].view(torch.uint8).long()]
        .flatten()
        .tolist()
    )
    expected: dict[str, int] = {}
    for value in values:
        exponent = max(e for e in range(-9, 9) if 2.0**e <= value)
        expected[f"2^{exponent}"] = expected.get(f"2^{exponent}", 0) + 1
    assert {name: count for name, count in found.scales.items() if count} == expected
    assert sum(found.scales.values()) == 256 * 128 // 16


def test_codes_are_counted_by_their_values(found: Inspection, linear: dict[str, Tensor]) -> None:
    packed_OB = linear["weight_packed"].int()
    codes = torch.stack([packed_OB & 15, packed_OB >> 4]).flatten().tolist()
    values = [*(-v for v in reversed(formats.E2M1[1:])), *formats.E2M1]
    assert list(map(float, found.codes)) == values
    for name, count in found.codes.items():
        magnitude = formats.E2M1.index(abs(float(name)))
        assert count == codes.count(magnitude + 8 * (float(name) < 0)), name
    assert sum(found.codes.values()) == 256 * 128
    assert found.zero_share == codes.count(0) / len(codes)
    assert 0.5 <= found.zero_share < 0.8, "half of the pairs, and what rounds to zero"


def test_codes_are_written_with_their_signs(found: Inspection) -> None:
    assert list(found.codes) == [
        "-6",
        "-4",
        "-3",
        "-2",
        "-1.5",
        "-1",
        "-0.5",
        "0",
        "+0.5",
        "+1",
        "+1.5",
        "+2",
        "+3",
        "+4",
        "+6",
    ]


def test_weight_error_is_the_manifests_and_absent_without_a_source(
    finished: SmallRun, found: Inspection, clean: Folder
) -> None:
    claims = CheckpointManifest.from_json(
        clean.files["p48ray.json"], "p48ray.json"
    ).relative_weight_errors
    assert found.relative_weight_error == pytest.approx(claims[NAME], rel=1e-5)
    assert inspect_linear(LocalStore(finished.checkpoint), NAME, None).relative_weight_error is None


def test_first_linear_is_inspected_where_none_is_named(finished: SmallRun) -> None:
    found = inspect_linear(LocalStore(finished.checkpoint), None, None)
    assert found.name == "language_model.model.layers.1.mlp.experts.0.down_proj"


def test_unknown_linear_is_refused_with_names_that_are_near(finished: SmallRun) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"no compressed linear 'experts\.7\.down'; for instance"
            r" language_model\.model\.layers\.1\..*\.7\.down_proj"
        ),
    ):
        inspect_linear(LocalStore(finished.checkpoint), "experts.7.down", None)
    with pytest.raises(
        ConfigError, match="no compressed linear 'nothing like it'; for instance language_model"
    ):
        inspect_linear(LocalStore(finished.checkpoint), "nothing like it", None)


def test_folder_that_holds_nothing_compressed_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            "expected compressed expert linears, found none; is this the checkpoint/ folder of a"
            " p48ray run"
        ),
    ):
        inspect_linear(LocalStore(TINY), None, None)
    with pytest.raises(SourceError, match=r"config\.json: expected in memory://no-such-place"):
        inspect_linear(MemoryStore("no-such-place"), None, None)


def printed(found: Inspection) -> str:
    out = io.StringIO()
    print_inspection(found, Console(file=out, width=120))
    return out.getvalue()


def test_printed_inspection_shows_histograms_and_error(found: Inspection) -> None:
    text = printed(found)
    assert f"{NAME}  256 x 128" in text
    assert f"relative weight error |W - Q|^2 / |W|^2: {found.relative_weight_error:.5f}" in text
    for words in ("pairs kept of four", "xx..", "E4M3 scales", "2^", "E2M1 codes", "-6", "####"):
        assert words in text
    assert "not paired-4:8" not in text


def test_illegal_groups_are_counted_and_said(clean: Folder) -> None:
    folder = clean.with_bytes(f"{NAME}.weight_packed", 0, b"\x11\x11\x11\x00\x11\x11\x11\x11")
    found = inspect_linear(folder.store(), NAME, None)
    assert found.illegal_groups == 2
    assert "2 groups of 8 inputs keep more than 2 of 4 pairs: not paired-4:8" in printed(found)


@pytest.mark.parametrize(
    "scale_byte", [0x00, 0x7F, 0x80, 0xB8], ids=["zero", "NaN", "minus zero", "negative"]
)
def test_damaged_scales_are_inspected_all_the_same(
    clean: Folder, scale_byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A histogram by powers of two must not make room for all exponents between minus infinity and
    8."""
    real = Tensor.bincount

    def guarded(self: Tensor, *args: object, minlength: int = 0) -> Tensor:
        assert 0 <= minlength < 1000, f"a histogram of {minlength} bins"
        return real(self, *args, minlength=minlength)

    monkeypatch.setattr(Tensor, "bincount", guarded)
    found = inspect_linear(
        clean.with_bytes(f"{NAME}.weight_scale", 0, bytes([scale_byte])).store(), NAME, None
    )
    assert sum(found.scales.values()) == 256 * 128 // 16
    printed(found)


def test_minus_zeros_are_counted_among_the_codes(clean: Folder) -> None:
    found = inspect_linear(
        clean.with_bytes(f"{NAME}.weight_packed", 0, b"\x08\x80").store(), NAME, None
    )
    assert found.codes["-0"] == 2
    assert sum(found.codes.values()) == 256 * 128
