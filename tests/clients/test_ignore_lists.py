"""Servers' own matching of targets and ignore, over every linear's name: the experts are quantized,
and nothing else.

vLLM's and SGLang's functions for a name are run as they are (SGLang's from its file: the package
itself needs a GPU's libraries). vLLM takes a linear that nothing names as plain; SGLang refuses the
model, and so do these tests.
"""

import json
import subprocess
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.compressed_tensors import utils as vllm_utils

from tests.clients.conftest import main_python
from tests.conftest import REPO
from tests.reference import tiny_families

SOURCES = (*tiny_families.NAMES, "kimi's true shapes")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""As both servers' model classes have it; vLLM's DeepSeek fuses two more."""

VLLM_PACKED = PACKED | {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}


@cache
def sglang_utils() -> ModuleType:
    package = find_spec("sglang")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / (
        "srt/layers/quantization/compressed_tensors/utils.py"
    )
    spec = spec_from_file_location("sglang_compressed_tensors_utils", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("names") / "names.json"
    command = [main_python(), "-m", "tests.clients.names", str(file)]
    subprocess.run(command, cwd=REPO, check=True)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def is_quantized(utils: ModuleType, name: str, config: dict[str, Any], packed: Any) -> bool:
    """As both servers decide it. Raises: ValueError for a linear that neither list names."""
    if utils.should_ignore_layer(name, ignore=config["ignore"], fused_mapping=packed):
        return False
    (group,) = config["config_groups"].values()
    module = torch.nn.Module()
    return utils.find_matched_target(name, module, group["targets"], packed) is not None


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("source", SOURCES)
def test_experts_are_quantized_and_nothing_else(
    names: dict[str, Any], source: str, server: str
) -> None:
    utils = vllm_utils if server == "vllm" else sglang_utils()
    packed = VLLM_PACKED if server == "vllm" else PACKED
    found = names[source]
    assert len(found["plain"]) > 20 and len(found["experts"]) >= 2 * 8 * 3

    def quantized(name: str) -> bool:
        return is_quantized(utils, name, found["config"], packed)

    # One of each projection stands for an expert: no pattern looks at its number.
    experts = [n for n in found["experts"] if ".experts.0." in n or ".experts.7." in n]
    assert [name for name in found["plain"] if quantized(name)] == []
    assert [name for name in experts if not quantized(name)] == []


def test_sglang_refuses_a_linear_that_nothing_names(names: dict[str, Any]) -> None:
    """Why the list is there; once this fails, it may be shorter."""
    config = names["kimi_k25"]["config"] | {"ignore": []}
    with pytest.raises(ValueError, match="Unable to find matching target"):
        is_quantized(sglang_utils(), "model.layers.0.self_attn.o_proj", config, PACKED)
