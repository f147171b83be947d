"""The whole job on a small checkpoint of every family, ending with a folder that verifies and that
transformers loads."""

import json
import re
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load
from torch import Tensor
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from p48ray.finished.verifier import verify_folder
from p48ray.finished.verify_checkpoint import CheckpointVerdict
from p48ray.integrations import transformers as integration
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.runner.pipeline import run_job
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.prepare import prepare
from p48ray.store import LocalStore, open_store
from tests.conftest import timeless
from tests.reference import fp8, tiny_families, whole_model
from tests.servers.s3 import BUCKET, Server
from tests.stages.damage import Folder
from tests.stages.family_runs import SETTINGS, finished_family
from tests.stages.small_run import SmallRun, configure, run_locally

pytestmark = pytest.mark.slow

SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
FP8_FAMILIES = ("kimi_k2", "deepseek_v3")


@pytest.fixture(scope="module", params=tiny_families.NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(family: str, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return finished_family(family, tmp_path_factory.mktemp("family"))


def verdict(folder: Folder, source: Path | None) -> CheckpointVerdict:
    return verify_folder(folder.store(), LocalStore(source) if source else None)


def as_output(stored: dict[str, Tensor], name: str) -> Tensor:
    """An untouched tensor as the output has to hold it."""
    weight, scale_inv = stored[name], stored.get(f"{name}_scale_inv")
    return weight if scale_inv is None else fp8.decode(weight, scale_inv)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_checkpoint_verifies_alone_and_against_its_source(run: SmallRun, family: str) -> None:
    folder = Folder.read(run.checkpoint)
    for source in (None, run.source):
        found = verdict(folder, source)
        assert found.problems == ()
        assert (found.num_linears, found.compared_with_source) == (2 * 8 * 3, source is not None)
        assert found.num_shards > 1


def test_tensors_are_four_an_expert_linear_and_the_sources_others(
    run: SmallRun, family: str
) -> None:
    stored, written = whole_model.read_all(run.source), whole_model.read_all(run.checkpoint)
    linears = set(tiny_families.expert_linears(family))
    untouched = {
        n for n in stored if n.rpartition(".")[0] not in linears and not n.endswith("_scale_inv")
    }
    assert set(written) == untouched | {
        f"{linear}.{suffix}" for linear in linears for suffix in SUFFIXES
    }
    for name in untouched:
        expected = as_output(stored, name)
        assert (written[name].dtype, written[name].shape, raw(written[name])) == (
            expected.dtype,
            expected.shape,
            raw(expected),
        ), name
    assert not any(t.dtype == torch.float8_e4m3fn for n, t in written.items() if n in untouched)


def test_what_became_bf16_is_recorded_in_plan_card_and_manifest(run: SmallRun, family: str) -> None:
    stored = whole_model.read_all(run.source)
    linears = set(tiny_families.expert_linears(family))
    decoded = [
        n
        for n, t in stored.items()
        if t.dtype == torch.float8_e4m3fn and n.rpartition(".")[0] not in linears
    ]
    plan, card = (
        json.loads((run.root / "plan.json").read_text()),
        (run.checkpoint / "README.md").read_text(),
    )
    manifest = CheckpointManifest.load(LocalStore(run.checkpoint), "p48ray.json")
    assert plan["source"]["num_fp8_outside_experts"] == len(decoded)
    assert set(decoded) <= manifest.untouched_sha256.keys()
    assert bool(decoded) == (family in FP8_FAMILIES)
    assert (
        f"but for {len(decoded)} weights that the source stores in FP8: they are BF16 here" in card
    ) == bool(decoded)
    assert ("byte for byte as in the source." in card) == (not decoded)
    assert ("Layer 3 behind the last one (multi-token prediction) passes through" in card) == (
        family == "deepseek_v3"
    )
    assert ("vision tower" in card) == (family == "kimi_k25")


def test_config_is_the_sources_but_for_its_quantization(run: SmallRun, family: str) -> None:
    config, source = (
        json.loads((folder / "config.json").read_text()) for folder in (run.checkpoint, run.source)
    )
    quantization = config.pop("quantization_config")
    source.get("text_config", source).pop("quantization_config", None)
    assert config == source
    assert (quantization["quant_method"], quantization["format"]) == (
        "compressed-tensors",
        "nvfp4-pack-quantized",
    )
    # From the start of the name, as transformers and vLLM match; transformers calls Kimi-K2.5's
    # text model model.language_model.
    (group,) = quantization["config_groups"].values()
    (target,) = (re.compile(t.removeprefix("re:")) for t in group["targets"])
    others = {n.rpartition(".")[0] for n in whole_model.read_all(run.source)} - set(
        tiny_families.expert_linears(family)
    )
    ignore = [re.compile(pattern.removeprefix("re:")) for pattern in quantization["ignore"]]
    for name in tiny_families.expert_linears(family):
        assert target.match(name) and not any(pattern.match(name) for pattern in ignore)
    for name in others:
        is_linear = "norm" not in name and "embed" not in name and "pos_emb" not in name
        assert not is_linear or any(pattern.match(name) for pattern in ignore), name
    behind = [name for name in others if target.match(name)]
    assert bool(behind) == (family == "deepseek_v3"), "experts behind the last layer"


@pytest.fixture
def stock_afterwards() -> Iterator[None]:
    before = CompressedTensorsHfQuantizer.get_load_operations
    yield
    CompressedTensorsHfQuantizer.get_load_operations = before


def test_transformers_loads_it_with_the_dense_twins_logits(
    run: SmallRun, family: str, stock_afterwards: None
) -> None:
    """The twin: the source run whole by transformers, the experts that compressed-tensors decodes
    put in by hand."""
    tensors, twin = whole_model.read_all(run.checkpoint), whole_model.load(run.source)
    scheme, decoder = (
        preset_name_to_scheme("NVFP4", ["Linear"]),
        BaseCompressor.get_value_from_registry("nvfp4-pack-quantized"),
    )
    prefix = whole_model.PREFIX if family == "kimi_k25" else ""
    ids_BS = torch.arange(5, 165)[None]
    with torch.no_grad():
        dense = twin(ids_BS).logits
        for layer in tiny_families.moe_layers(family):
            for expert in range(tiny_families.EXPERTS):
                stem = f"{prefix}model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (
                    decoder.decompress(
                        {s: tensors[f"{stem}.{p}.{s}"] for s in SUFFIXES[:3]}, scheme
                    )["weight"].float()
                    for p in ("gate_proj", "up_proj", "down_proj")
                )
                module = twin.model.layers[layer].mlp.experts
                module.gate_up_proj[expert].copy_(torch.cat([gate, up]))
                module.down_proj[expert].copy_(down)
        expected = twin(ids_BS).logits
        found = integration.load_model(str(run.checkpoint), dtype=torch.float32)(
            input_ids=ids_BS
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).abs().max() > 0.1, "compression would not show"


def test_run_measured_what_it_lost(run: SmallRun) -> None:
    quality = run.report.quality
    assert quality is not None and quality.num_tokens == 3 * 64
    assert 0 < quality.kl < 10


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight"],
)
def test_weight_that_is_not_the_sources_as_bf16_is_found(
    run: SmallRun, family: str, name: str
) -> None:
    """One bit, in a tensor of an FP8 source or of another."""
    if family == "qwen3_moe":
        name = "model.layers.1.self_attn.o_proj.weight"
    name = f"{whole_model.PREFIX}{name}" if family == "kimi_k25" else name
    damaged = Folder.read(run.checkpoint).flipped(name, 101, 0x01)
    words = (
        "values differ from the source's FP8 weight as BF16"
        if family in FP8_FAMILIES
        else "bytes differ from the source's"
    )
    (problem,) = verdict(damaged, run.source).problems
    assert f"{name}: {words} (model-" in problem
    (problem,) = verdict(damaged, None).problems
    assert f"{name}: bytes differ from those that were verified" in problem


@pytest.mark.slow
def test_weights_are_decoded_into_a_bucket_too(seaweedfs: Server, tmp_path: Path) -> None:
    """A shard made of ranges of two places in the bucket and of weights decoded between them."""
    alone = finished_family("deepseek_v3", tmp_path)
    place, endpoint = f"s3://{BUCKET}/{uuid.uuid4().hex}", seaweedfs.endpoint_url
    bucket = open_store(f"{place}/source", endpoint)
    for path in alone.source.iterdir():
        bucket.put(path.name, path.read_bytes())
    overrides = (
        f"source.endpoint_url={endpoint}",
        f"run.endpoint_url={endpoint}",
        "output.max_shard_size=30MB",
    )
    prepared = prepare(configure(f"{place}/source", f"{place}/run", *SETTINGS, *overrides))
    run_locally(prepared)
    checkpoint = open_store(f"{place}/run/checkpoint", endpoint)
    assert verify_folder(checkpoint, LocalStore(alone.source)).problems == ()
    files = [info.key for info in checkpoint.list() if info.key.endswith(".safetensors")]
    assert len(files) == 1
    written, expected = load(checkpoint.get(files[0])), whole_model.read_all(alone.checkpoint)
    assert written.keys() == expected.keys()
    assert all(raw(written[name]) == raw(expected[name]) for name in expected)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_makes_the_same_checkpoint(tmp_path: Path) -> None:
    """DeepSeek-V3, whose shards hold decoded weights: two workers' files are one process's, byte
    for byte."""
    alone = finished_family("deepseek_v3", tmp_path)
    prepared = prepare(configure(alone.source, tmp_path / "ray", *SETTINGS, "run.num_workers=2"))
    run_job(prepared, partial(RayRunner, address=None))
    ours, theirs = (Folder.read(root / "checkpoint") for root in (tmp_path / "ray", alone.root))
    assert {n: timeless(d) for n, d in ours.files.items() if n != "README.md"} == {
        n: timeless(d) for n, d in theirs.files.items() if n != "README.md"
    }
