"""One layer at a time: the same model under other names and storages is the same model, and what is
missing is named."""

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.tensors import tensor_bytes
from p48ray.errors import SourceError
from p48ray.model.decoder import Decoder, run_layer
from p48ray.model.experts import ExpertWeights, RoutedExperts, RoutedInputs
from p48ray.run.manifest import ActivationPart, BoundaryPart
from p48ray.stages.capture import capture_parts
from p48ray.stages.prepare import prepare
from p48ray.store import LocalStore
from tests.checkpoint.tiny_variants import TINY, flat_names, load_tiny, plain_experts, write_folder
from tests.reference import whole_model
from tests.stages.small_run import configure, write_inputs_once

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model nested or flat, with INT4 or bf16 experts, each with its tokenizer."""
    root, tensors = tmp_path_factory.mktemp("variants"), load_tiny()
    nested = json.loads((TINY / "config.json").read_text())
    flat = nested["text_config"]
    plain = {key: value for key, value in flat.items() if key != "quantization_config"}
    write_folder(root / "nested_bf16", nested | {"text_config": plain}, plain_experts(tensors))
    write_folder(root / "flat_int4", flat, flat_names(tensors))
    write_folder(
        root / "flat_bf16",
        plain | {"model_type": "deepseek_v3"},
        flat_names(plain_experts(tensors)),
        num_files=3,
    )
    for folder in root.iterdir():
        for name in TOKENIZER:
            shutil.copy(TINY / name, folder / name)
    return {"nested_int4": TINY} | {folder.name: folder for folder in root.iterdir()}


def captured(source: Path) -> dict[str, list[bytes]]:
    """Every column that capture writes of one sequence, and what its manifests say of the
    values."""
    prepared = prepare(
        configure(
            source,
            f"memory://{uuid.uuid4().hex}",
            "calibration.num_sequences=1",
            "calibration.sequence_length=32",
            "evaluation=null",
        )
    )
    write_inputs_once(prepared)
    capture_parts(prepared.context, [0])
    context, found = prepared.context, dict[str, list[bytes]]()
    for info in prepared.store.list():
        if info.key.startswith(("residuals/", "activations/")) and info.key.endswith(".json"):
            kind, layer = info.key.split("/")[0], int(info.key.split("/")[1].removeprefix("layer-"))
            record = ActivationPart if kind == "activations" else BoundaryPart
            columns = context.blob(kind, layer, 0)  # type: ignore[arg-type]
            found[info.key] = [tensor_bytes(tensor) for tensor in columns.values()]
            if record is ActivationPart:
                manifest = ActivationPart.load(context.store, info.key)
                found[info.key].append(
                    repr(
                        (
                            manifest.amax_input,
                            manifest.amax_by_expert,
                            manifest.tokens_per_expert,
                        )
                    ).encode()
                )
    return found


@pytest.mark.slow
def test_all_variants_of_a_model_capture_the_same_bytes(variants: dict[str, Path]) -> None:
    expected = captured(variants["nested_int4"])
    assert len(expected) == 4 + 4, "a boundary before and the activations of each of layers 1 to 4"
    for name, folder in variants.items():
        assert captured(folder) == expected, name


def open_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    index = open_checkpoint(LocalStore(folder))
    return Decoder(index, describe_model(index), torch.device("cpu"), dtype)


def source_experts(decoder: Decoder, layer: int) -> RoutedExperts:
    tensors = whole_model.read_all(TINY)

    def decode(expert: int) -> ExpertWeights:
        stem = f"language_model.model.layers.{layer}.mlp.experts.{expert}"
        return ExpertWeights(
            *(
                whole_model.decode_int4(tensors, f"{stem}.{p}").to(decoder.dtype)
                for p in ("gate_proj", "up_proj", "down_proj")
            )
        )

    return RoutedExperts(16, decode)


def random_ids(batch: int = 3, length: int = 24) -> Tensor:
    return torch.randint(0, 2048, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_of(decoder: Decoder, ids_BS: Tensor, micro_batch: int = 2) -> Tensor:
    x_BSH, positions = decoder.embed(ids_BS), decoder.positions(ids_BS.shape[1])
    for number in range(5):
        x_BSH = run_layer(
            decoder.layer(number, source_experts(decoder, number) if number else None),
            x_BSH,
            positions,
            micro_batch,
        )
    logits: Tensor = decoder.head()(x_BSH)
    return logits


def test_stream_of_layers_gives_the_whole_models_logits() -> None:
    ids_BS = random_ids()
    expected, _ = whole_model.run_and_record(whole_model.load(TINY), ids_BS)
    found = logits_of(open_decoder(TINY), ids_BS)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_tokens_see_only_what_stands_before_them_in_their_own_sequence() -> None:
    decoder, ids_BS = open_decoder(TINY), random_ids()
    other_BS = ids_BS.clone()
    other_BS[0, 10] = (other_BS[0, 10] + 1) % 2048
    difference_BS = (logits_of(decoder, ids_BS) - logits_of(decoder, other_BS)).abs().amax(-1)
    assert (difference_BS[0, :10] < 1e-4).all() and (difference_BS[1:] < 1e-4).all()
    assert (difference_BS[0, 10:] > 1e-3).all()


def test_routers_bias_stays_in_float32_where_layers_run_in_bf16() -> None:
    decoder = open_decoder(TINY, torch.bfloat16)
    module = decoder.layer(1, source_experts(decoder, 1))
    assert module.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert module.mlp.gate.weight.dtype == module.self_attn.o_proj.weight.dtype == torch.bfloat16
    x_BSH = run_layer(module, decoder.embed(random_ids()), decoder.positions(24), 2)
    assert x_BSH.dtype == torch.bfloat16 and torch.isfinite(x_BSH.float()).all()


def test_layer_holds_no_weights_of_the_routed_experts_and_no_gradients() -> None:
    seen: list[RoutedInputs] = []
    experts = RoutedExperts(16, source_experts(open_decoder(TINY), 2).weights, observe=seen.append)
    module = open_decoder(TINY).layer(2, experts)
    assert not any("experts." in name and "shared" not in name for name in module.state_dict())
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    decoder = open_decoder(TINY)
    run_layer(module, decoder.embed(random_ids()), decoder.positions(24), 2)
    assert len(seen) == 1 and seen[0].hidden_TH.shape == (
        3 * 24,
        256,
    ), "all tokens of a part in one call, whatever the micro-batch"


def damaged(change: str) -> CheckpointIndex:
    """An index that lacks a tensor of layer 1, or has one too many."""
    index = open_checkpoint(LocalStore(TINY))
    entry = index.tensors["language_model.model.layers.1.self_attn.q_a_layernorm.weight"]
    if change == "missing":
        del index.tensors[entry.name]
    else:
        stray = replace(entry, name="language_model.model.layers.1.self_attn.surprise")
        index.tensors[stray.name] = stray
    return index


@pytest.mark.parametrize(
    ("change", "words"),
    [("missing", "self_attn.q_a_layernorm.weight"), ("unexpected", "self_attn.surprise")],
)
def test_layer_with_a_tensor_too_few_or_too_many_is_refused_by_name(
    change: str, words: str
) -> None:
    index = damaged(change)
    decoder = Decoder(
        index, describe_model(open_checkpoint(LocalStore(TINY))), torch.device("cpu"), torch.float32
    )
    with pytest.raises(SourceError, match=rf"layer 1: .*{change}.*'{words}'"):
        decoder.layer(1, source_experts(decoder, 1))


def test_tensor_outside_the_layers_that_is_missing_is_named() -> None:
    decoder = open_decoder(TINY)
    del decoder.index.tensors["language_model.lm_head.weight"]
    with pytest.raises(SourceError, match=r"tensor language_model\.lm_head\.weight is missing"):
        decoder.head()
