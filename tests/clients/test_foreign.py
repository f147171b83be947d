"""A checkpoint that others have made paired-4:8 sparse, converted to dense storage, in vLLM on a
CPU: it loads whole, and answers as the same weights do."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from tests.clients.conftest import main_python
from tests.clients.test_vllm import EXPERTS_NAME, LAYERS, NEW_TOKENS, SETTINGS, ask, kl, read_all
from tests.clients.torch_nvfp4 import in_the_emulations_slot
from tests.conftest import REPO


@pytest.fixture(scope="module")
def folder(made: Path) -> Path:
    command = [main_python(), "-m", "tests.clients.foreign", str(made)]
    subprocess.run(command, cwd=REPO, check=True)
    return made


def test_engine_answers_as_the_converted_weights(folder: Path) -> None:
    twins = load_file(folder / "foreign.safetensors")
    tensors = read_all(folder / "foreign-dense")
    theirs = read_all(folder / "foreign")
    name = f"{EXPERTS_NAME.format(LAYERS[0])}.0"
    assert f"{name}.up_proj.weight_sparse_mask" in theirs
    one, other = (theirs[f"{name}.{p}.weight_global_scale"] for p in ("gate_proj", "up_proj"))
    assert not torch.equal(one, other)
    assert tensors[f"{name}.up_proj.weight_global_scale"].tolist() == [float(min(one, other))]
    with in_the_emulations_slot():
        engine = LLM(model=str(folder / "foreign-dense"), **SETTINGS)
        answer = ask(engine, twins["tokens"][:, :-NEW_TOKENS])
    assert torch.equal(answer.tokens_BS, twins["tokens"])
    assert kl(twins["logprobs.converted"][:, :-1], answer.logprobs_BSV).max() < 1e-6
    expected = twins["logprobs.theirs"]
    distance = kl(expected[:, :-1], answer.logprobs_BSV).mean()
    misread = kl(expected, twins["logprobs.misread"]).mean()
    # rounding moves the model, but far less than one global scale for two would
    assert 1e-6 < distance < misread / 20, (distance, misread)
