"""The benchmarks' checkpoints: tensors lie as safetensors' own writer lays them, the job can read
them, texts suffice."""

import json
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench import capture
from bench.wide_checkpoint import write_checkpoint, write_texts
from p48ray.checkpoint import skeleton
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import open_checkpoint
from p48ray.store.local import LocalStore
from p48ray.texts.sequences import load_tokenizer
from tests.conftest import TINY

EXPERTS, MIXTURES = 12, 2  # so many that an order of numbers and one of names differ


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "small"
    write_checkpoint(folder, "small", EXPERTS, MIXTURES, "cpu")
    return folder


def data_order(path: Path) -> list[tuple[str, str]]:
    """(name, dtype) of a file's tensors, from its first byte of data to its last."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = {n: r for n, r in json.loads(data[8 : 8 + length]).items() if n != "__metadata__"}
    return [
        (name, r["dtype"])
        for name, r in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    ]


def assert_in_safetensors_order(path: Path, again: Path) -> None:
    """save_file, given the same tensors in the opposite order, lays them as the file has them."""
    tensors = load_file(path)
    save_file(dict(sorted(tensors.items(), reverse=True)), again)
    assert data_order(path) == data_order(again)


def test_shards_are_in_the_order_of_safetensors_own_writer(small: Path, tmp_path: Path) -> None:
    shards = sorted(small.glob("*.safetensors"))
    assert len(shards) == 1 + MIXTURES + 1
    for shard in shards:
        assert_in_safetensors_order(shard, tmp_path / "again.safetensors")
    assert {dtype for _, dtype in data_order(shards[1])} == {"F32", "I32", "BF16"}


def test_the_bench_layer_is_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {
        "HIDDEN": 256,
        "MOE_INTERMEDIATE": 128,
        "HEADS": 4,
        "Q_LORA": 96,
        "KV_LORA": 64,
    }.items():
        monkeypatch.setattr(skeleton, name, size)
    capture.write_layer(tmp_path, EXPERTS)
    assert_in_safetensors_order(tmp_path / "model.safetensors", tmp_path / "again.safetensors")
    layout = describe_model(open_checkpoint(LocalStore(tmp_path)))
    assert (layout.num_experts, layout.moe_layers) == (EXPERTS, (0,))


def test_sizes_are_those_asked_for_and_only_while_writing(small: Path) -> None:
    layout = describe_model(open_checkpoint(LocalStore(small)))
    assert (layout.hidden_size, layout.num_experts, layout.moe_layers) == (256, EXPERTS, (1, 2))
    assert (skeleton.HIDDEN, skeleton.NUM_EXPERTS) == (7168, 384)


def test_embedding_has_outlier_channels_and_no_scale_is_negative(small: Path) -> None:
    tensors = {
        name: t for shard in small.glob("*.safetensors") for name, t in load_file(shard).items()
    }
    strength = tensors["language_model.model.embed_tokens.weight"].float().square().mean(0).sqrt()
    assert strength[::128].min() > 10 * strength[1:128].max()
    assert all(bool((t > 0).all()) for name, t in tensors.items() if name.endswith("_scale"))


@pytest.mark.slow
def test_texts_suffice(small: Path, tmp_path: Path) -> None:
    """Once around for few tokens, several times for many, each time other texts."""
    tokenizer = load_tokenizer(open_checkpoint(LocalStore(small)), trust_remote_code=False)
    for num_tokens, rounds in ((1, 1), (300_000, 2)):
        write_texts(tmp_path / "texts.jsonl", num_tokens)
        texts = [
            json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()
        ]
        once = len(texts) // rounds
        assert once == len((TINY / "calibration.jsonl").read_text().splitlines())
        assert len(set(texts)) > 0.9 * len(texts)
        tokens_once = sum(len(tokenizer.encode(text)) for text in texts[:once])
        assert tokens_once * rounds > num_tokens
