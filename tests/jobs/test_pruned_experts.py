"""A checkpoint of which experts were pruned: the job ends with 0, its checkpoint is verified, and
both storages hold it."""

import re
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.report.report import Report
from tests.jobs.command import HELD_OUT, arguments, invoke, snapshot
from tests.reference import narrow

pytestmark = pytest.mark.slow

PRUNED = r"\.layers\.1\.mlp\.experts\.(3\..*|5\.up_proj)\.weight$"
TINY = r"\.layers\.1\.mlp\.experts\.7\..*\.weight$"
NO_INTERMEDIATES = r"\.layers\.2\.mlp\.experts\.\d+\.gate_proj\.weight$"
NO_INPUTS = r"\.layers\.3\.post_attention_layernorm\.weight$"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    load = narrow.load_tiny

    def pruned() -> dict[str, Tensor]:
        found = narrow.plain_experts(load())
        for name in found:
            if re.search(f"{PRUNED}|{NO_INTERMEDIATES}|{NO_INPUTS}", name):
                found[name] = found[name] * 0
            elif re.search(TINY, name):
                found[name] = found[name] * 1e-30
        return found

    with mock.patch.object(narrow, "load_tiny", pruned):
        return narrow.write_narrow(tmp_path / "source")


def test_pruned_experts_end_in_a_verified_checkpoint(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    settings = {
        "source.checkpoint": str(source),
        "compression.max_fallback_share": "0",
        "compression.scale_span": "32",
        "compression.output_curvature": "true",
        "compression.code_sweeps": "1",
        "compression.refine_steps": "2",
        "evaluation": HELD_OUT,
    }
    outcome = invoke(*arguments(root, settings))
    assert outcome.code == 0, outcome
    assert "verified    " in outcome.out
    report = Report.from_json((root / "report" / "report.json").read_bytes(), "report.json")
    # layer 1: all of expert 3, up and down of 5, all of 7; layer 2: gates and downs; layer 3: all
    assert report.outcomes["zero"] == 3 + 2 + 3 + 32 + 48
    assert "round_to_nearest" not in report.outcomes
    assert (report.zero_inputs, report.zero_intermediates) == ((3,), (2, 3))
    assert "Layers whose experts' inputs are all zero: 3." in outcome.out
    page = (root / "report" / "report.html").read_text()
    assert "Layers whose intermediates are all zero: 2, 3." in page
    assert report.quality is not None and 0 <= report.quality.kl < 1
    for command in (
        ["verify", str(root / "checkpoint"), "--source", str(source)],
        ["convert", str(root / "checkpoint"), str(tmp_path / "sparse"), "--storage", "sparse"],
        ["convert", str(tmp_path / "sparse"), str(tmp_path / "dense"), "--storage", "dense"],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
    ours, back = snapshot(root / "checkpoint"), snapshot(tmp_path / "dense")
    shards = {name for name in ours if name.endswith(".safetensors")}
    assert shards and {n: ours[n] for n in shards} == {n: back[n] for n in shards}
