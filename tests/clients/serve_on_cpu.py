"""vLLM's own command line with an NVFP4 kernel for the CPU in its emulation's slot: `python -m
tests.clients.serve_on_cpu serve CHECKPOINT ...`.

vLLM's workers are processes that import this module anew, so what is replaced is replaced at its
import.
"""

import importlib.metadata
import os
from contextlib import ExitStack
from unittest import mock

os.environ |= {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm.config import ModelConfig
from vllm.entrypoints.cli.main import main

from tests.clients.torch_nvfp4 import TorchNvfp4Experts, in_the_emulations_slot

stock = importlib.metadata.version


def version(name: str) -> str:
    """The package is called vllm-cpu, of which vLLM's command line knows nothing."""
    return stock("vllm-cpu" if name == "vllm" else name)


replaced = ExitStack()  # for as long as the process lives
replaced.enter_context(mock.patch.object(importlib.metadata, "version", version))
replaced.enter_context(
    mock.patch.object(ModelConfig, "_supports_multimodal_inputs", lambda self: False)
)  # the small model has no image processor
replaced.enter_context(in_the_emulations_slot())
TorchNvfp4Experts.quantizes_activations = True  # W4A4, as it is served

if __name__ == "__main__":
    main()
