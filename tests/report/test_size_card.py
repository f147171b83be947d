"""What the card says is gained, by the files' own bytes."""

import re
from dataclasses import replace

import pytest
from safetensors import safe_open

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ExpertStorage
from p48ray.report.size_card import gains_section
from p48ray.run.plan import RunPlan
from p48ray.unit.context import StageContext
from tests.stages.small_run import SmallRun


def with_compression(context: StageContext, **settings: object) -> StageContext:
    config = context.plan.config
    changed = config.compression.model_copy(update=settings)
    plan: RunPlan = context.plan.model_copy(
        update={"config": config.model_copy(update={"compression": changed})}
    )
    return replace(context, plan=plan)


def bytes_of_experts(finished: SmallRun) -> int:
    found = 0
    for path in finished.checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if ".experts." in name:
                    tensor = opened.get_tensor(name)
                    found += tensor.numel() * tensor.element_size()
    return found


def test_int4_source_has_the_same_size_and_other_arithmetic(finished: SmallRun) -> None:
    text = gains_section(finished.context)
    assert re.search(r"Equal in dense storage: 4\.5\d bits a weight, 4\.5\d in the source\.", text)
    assert "meet in 4 bits (W4A4)" in text
    assert "INT4 (a scale per 32 inputs) weights are multiplied with activations of 16 bits" in text
    found = re.search(r"in ([\d,]+) bytes, 2\.7\d bits a weight: 0\.61 times the dense", text)
    assert found is not None
    sparse, dense = int(found[1].replace(",", "")), bytes_of_experts(finished)
    assert round(sparse / dense, 2) == 0.61 and "times the source's" not in text
    assert "for the paired48 patch of vLLM, on SM100 and SM120 GPUs only" in text


@pytest.mark.parametrize("settings", [{"sparsity": "none"}, {"scale_span": 16}])
def test_no_sparse_storage_is_promised_where_there_is_none(
    finished: SmallRun, settings: dict[str, object]
) -> None:
    text = gains_section(with_compression(finished.context, **settings))
    assert "Sparse storage" not in text and "W4A4" in text


@pytest.mark.parametrize(("storage", "bits"), [("bf16", "16"), ("fp8", "8")])
def test_larger_source_is_a_gain_of_size(
    finished: SmallRun, monkeypatch: pytest.MonkeyPatch, storage: ExpertStorage, bits: str
) -> None:
    dense = bytes_of_experts(finished)
    monkeypatch.setattr(CheckpointIndex, "expert_bytes", lambda index, layout: 2 * dense)
    layout = replace(finished.context.layout, expert_storage=storage)
    text = gains_section(replace(finished.context, layout=layout))
    assert "0.50 times the source's bytes in dense storage: " in text
    assert f"activations of {bits} bits" in text
    assert "0.61 times the dense ones and 0.31 times the source's" in text
