"""Commands for a model's own size, and the loader that loads it rightly."""

import re
from dataclasses import replace
from typing import Any

import pytest
from safetensors import safe_open

from p48ray.checkpoint.layout import ModelLayout
from p48ray.report.serving_card import TRANSFORMERS, dense_bytes, gpus_for, serving
from tests.stages.small_run import SmallRun

GB = 10**9


def layout_with(finished: SmallRun, heads: Any, intermediate: int) -> ModelLayout:
    text_config = {**finished.context.layout.text_config, "num_attention_heads": heads}
    return replace(
        finished.context.layout, text_config=text_config, moe_intermediate_size=intermediate
    )


@pytest.mark.parametrize(
    ("num_bytes", "heads", "intermediate", "expected"),
    [
        (1, 64, 2048, (1, 1)),
        (162 * GB, 64, 2048, (1, 1)),
        (162 * GB + 1, 64, 2048, (2, 1)),
        (595 * GB, 64, 2048, (4, 1)),  # Kimi-K2.5
        (1296 * GB, 64, 2048, (8, 1)),
        (1296 * GB + 1, 64, 2048, (8, 2)),
        (300 * GB, 6, 2048, (2, 1)),
        (600 * GB, 6, 2048, (2, 2)),  # 4 divide no 6 heads
        (300 * GB, 64, 48, (1, 2)),  # nor 2 three groups of 16
        (300 * GB, None, 2048, (2, 1)),
    ],
)
def test_gpus_hold_the_weights_and_divide_the_model(
    finished: SmallRun, num_bytes: int, heads: Any, intermediate: int, expected: tuple[int, int]
) -> None:
    assert gpus_for(num_bytes, layout_with(finished, heads, intermediate)) == expected


def test_bytes_are_those_of_the_files(finished: SmallRun) -> None:
    found = 0
    for path in finished.checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                found += tensor.numel() * tensor.element_size()
    assert dense_bytes(finished.context) == found


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (
            595 * GB,
            [
                "595.00 GB in dense",
                "which 4 GPUs such as NVIDIA B200 (180 GB)",
                "13.25 GB are left",
            ],
        ),
        (2000 * GB, ["which 16 GPUs", "--pipeline-parallel-size 2", "37.00 GB are left"]),
    ],
)
def test_command_is_for_the_models_own_size(
    finished: SmallRun, monkeypatch: pytest.MonkeyPatch, num_bytes: int, words: list[str]
) -> None:
    monkeypatch.setattr("p48ray.report.serving_card.dense_bytes", lambda context: num_bytes)
    layout = layout_with(finished, 64, 2048)
    text = serving(replace(finished.context, layout=layout))
    for word in words:
        assert word in text
    count = int(re.findall(r"--tensor-parallel-size (\d+)", text)[0])
    assert count == (4 if num_bytes < 1000 * GB else 8)
    assert text.count(f"--tensor-parallel-size {count}") == 2


def test_no_snippet_loads_it_with_stock_transformers() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TRANSFORMERS, re.DOTALL)
    assert len(blocks) == 1 and "AutoModel" not in blocks[0]
    names: dict[str, Any] = {}
    exec(blocks[0].split("\n\n")[0], names)
    assert callable(names["load_model"])
