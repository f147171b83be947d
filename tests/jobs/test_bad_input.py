"""A mistake in what the user supplied: one clear error, exit code 2, nothing written. Through the
real command line."""

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.tiny_variants import load_tiny, plain_experts, write_folder
from tests.conftest import TINY
from tests.jobs.command import CONFIG, Outcome, arguments, copy_model, invoke, run_process, snapshot

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-000003.safetensors"
LAYERS = "language_model.model.layers"


def assert_refused(outcome: Outcome, words: list[str], root: Path) -> None:
    """Exit code 2, one error with all the words on stderr, no traceback, and no run root."""
    assert outcome.code == 2, outcome
    # Ray's own processes may say more there
    assert len(re.findall(r"^error: ", outcome.err, re.MULTILINE)) == 1
    assert "Traceback" not in outcome.err + outcome.out
    assert "error: " not in outcome.out
    for word in words:
        assert word in outcome.err, f"{word!r} not in {outcome.err!r}"
    assert not root.exists()


# Settings.


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "compression.dampp",
            "0.1",
            ["compression.dampp: unknown key", "did you mean compression.damp?"],
        ),
        ("compression.sweeps", "many", ["compression.sweeps", "valid integer", "'many'"]),
        ("output.storage", "thin", ["output.storage", "'dense' or 'sparse'", "'thin'"]),
        ("compression.solver", "gptq", ["solver 'gptq' needs sparsity 'none', found 'paired-4:8'"]),
    ],
)
def test_setting_is_refused_by_file_key_expected_and_found(
    key: str, value: str, words: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    assert_refused(invoke(*arguments(root, {key: value})), [str(CONFIG), *words], root)


@pytest.mark.parametrize("args", [(), ("--dry-run",)])
@pytest.mark.parametrize("place", ["hf://owner/name", "memory://here", "gs://bucket/run"])
def test_run_root_where_nothing_can_be_written_is_refused(
    place: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = invoke(*arguments(place), *args)
    assert_refused(
        outcome,
        [f"{CONFIG}: run.root: expected a local folder or s3://bucket/prefix, found {place!r}"],
        tmp_path / "run",
    )


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("root", "source", "found"),
    [
        ("model", "model", "the same"),
        ("link", "model", "the same"),
        ("model/run", "model", "one inside it"),
        ("link/deep/run", "model", "one inside it"),
        ("model/run", "link", "one inside it"),
        ("model/../model/run", "model", "one inside it"),
        ("run", "run/checkpoint/model", "the source lies where the run writes"),
        ("run", "run/source", "the source lies where the run writes"),
    ],
)
def test_run_root_and_source_that_are_not_apart_are_refused(
    root: str, source: str, found: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    """What a run leaves in its source's folder, the next run of that source would carry over."""
    (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
    model = tmp_path / ("model" if source == "link" else source)
    copy_model(model)
    (tmp_path / "link").symlink_to(model)
    before = snapshot(tmp_path)
    settings = {"source.checkpoint": str(tmp_path / source)}
    outcome = invoke(*arguments(tmp_path / root, settings), *args)
    words = ["run.root: ", "expected a place apart from source.checkpoint", found, "--run-root"]
    assert_refused(outcome, words, tmp_path / "none")
    assert snapshot(tmp_path) == before


def test_source_beside_what_a_run_writes_is_fine(tmp_path: Path) -> None:
    """In the run root, as a folder for models with a run of each may have it."""
    copy_model(tmp_path / "run" / "model")
    settings = {"source.checkpoint": str(tmp_path / "run" / "model")}
    assert invoke(*arguments(tmp_path / "run", settings), "--dry-run").code == 0


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize("place", ["s3://", "s3:///run", "s3://x"])
def test_run_root_in_no_bucket_is_refused(
    place: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    words = [f"run.root: {place}: expected s3://BUCKET", "found no bucket's name"]
    assert_refused(invoke(*arguments(place), *args), words, tmp_path / "run")


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize("below", ["", "/deep/run"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_run_root_that_is_a_file_is_refused(
    prefix: str, below: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "a file"
    file.write_text("mine")
    outcome = invoke(*arguments(f"{prefix}{file}{below}"), *args)
    words = [f"run.root: {file}{below}: expected a folder, found that {file} is a file"]
    assert_refused(outcome, words, tmp_path / "run")
    assert file.read_text() == "mine"


def test_run_root_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A superuser, as tests run here, may write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    outcome = invoke(*arguments(tmp_path / "run"), "--dry-run")
    assert_refused(outcome, [f"found that {tmp_path} may not be written"], tmp_path / "run")


def test_more_experts_a_unit_than_the_model_has_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert_refused(
        invoke(*arguments(root, {"run.experts_per_unit": "17"})),
        ["run.experts_per_unit", "at most", "16", "found 17"],
        root,
    )


def test_longer_sequences_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "run"
    outcome = invoke(*arguments(root, {"calibration.sequence_length": "4097"}))
    assert_refused(
        outcome,
        ["calibration.sequence_length", "max_position_embeddings = 4096", "found 4097"],
        root,
    )


# The source checkpoint.

Damage = Callable[[Path], None]


def drop_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncate_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000])


def truncate_shard_in_its_header(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:100])


def corrupt_header(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[8:12] = b"!!!!"
    (folder / SHARD).write_bytes(data)


def claim_a_huge_header(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", 2**60) + data[8:])


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def place_second_shard(folder: Path, file: str) -> None:
    """The index looks for the second shard's tensors in another file."""
    edit_index(
        folder,
        lambda weight_map: weight_map.update(
            {name: file for name, held in weight_map.items() if held == SHARD}
        ),
    )


def name_an_absent_tensor(folder: Path) -> None:
    edit_index(
        folder, lambda weight_map: weight_map.update({f"{LAYERS}.1.mlp.extra.weight": SHARD})
    )


def lead_the_index_to_the_parent(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "x.safetensors")
    place_second_shard(folder, "../x.safetensors")


def lead_the_index_to_an_absolute_path(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "x.safetensors")
    place_second_shard(folder, str(folder.parent / "x.safetensors"))


def rename_a_tensor(folder: Path, new: str) -> None:
    tensors = load_file(folder / SHARD)
    old = sorted(name for name in tensors if ".experts." not in name)[0]
    tensors[new] = tensors.pop(old)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    edit_index(folder, lambda weight_map: weight_map.update({new: weight_map.pop(old)}))


def lead_a_tensor_outside(folder: Path) -> None:
    rename_a_tensor(folder, "../../outside")


def root_a_tensor(folder: Path) -> None:
    rename_a_tensor(folder, "/etc/outside")


def drop_an_expert(folder: Path) -> None:
    drop_tensor(folder, f"{LAYERS}.2.mlp.experts.3.up_proj.weight_scale")


def drop_attention(folder: Path) -> None:
    drop_tensor(folder, f"{LAYERS}.2.self_attn.o_proj.weight")


def drop_tensor(folder: Path, name: str) -> None:
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file, metadata={"format": "pt"})
    edit_index(folder, lambda weight_map: weight_map.__delitem__(name))


def stretch_positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "su", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def be_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "llama"})
    )


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_shard, [INDEX, SHARD, "not in"]),
        (
            truncate_shard,
            [SHARD, "expected 3057328 bytes", "found a file of 3056328 bytes", "truncated"],
        ),
        (
            truncate_shard_in_its_header,
            [SHARD, "expected a header of", "found a file of 100 bytes", "truncated"],
        ),
        (corrupt_header, [SHARD, "expected JSON"]),
        (claim_a_huge_header, [SHARD, "expected a header of at most", f"found {2**60}"]),
        (name_an_absent_tensor, [INDEX, f"{LAYERS}.1.mlp.extra.weight", SHARD]),
        (lead_the_index_to_the_parent, [INDEX, "plain name", "found '../x.safetensors'"]),
        (lead_the_index_to_an_absolute_path, [INDEX, "plain name", "/x.safetensors'"]),
        (lead_a_tensor_outside, [SHARD, "'../../outside'", "expected a name without"]),
        (root_a_tensor, [SHARD, "'/etc/outside'", "expected a name without"]),
        (drop_an_expert, [f"{LAYERS}.2.mlp.experts.3.up_proj.weight_scale", "expected", "found"]),
        (
            drop_attention,
            [
                f"{LAYERS}.2.self_attn.o_proj.weight",
                "expected BF16",
                "by config.json",
                "found none",
            ],
        ),
        (stretch_positions, ["config.json: text_config.rope_parameters.rope_type: found 'su'"]),
        (break_config, ["config.json", "expected JSON"]),
        (
            be_another_model,
            [
                "config.json: model_type",
                "one of deepseek_v3, kimi_k2, kimi_k25, qwen3_moe, found 'llama'",
                "docs/families.md shows how",
            ],
        ),
        (drop_config, ["config.json", "found none"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_source_is_refused_by_file_expected_and_found(
    damage: Damage, words: list[str], tmp_path: Path
) -> None:
    folder, root = copy_model(tmp_path / "model"), tmp_path / "run"
    damage(folder)
    before = snapshot(tmp_path)
    assert_refused(invoke(*arguments(root, {"source.checkpoint": str(folder)})), words, root)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("first_k_dense_replace", 10**9),
        ("hidden_size", 10**12),
        ("n_routed_experts", 10**9),
        ("moe_intermediate_size", 10**12),
        ("vocab_size", 10**12),
        ("num_attention_heads", 10**9),
        ("kv_lora_rank", 10**12),
        ("max_position_embeddings", float("inf")),
    ],
)
def test_size_that_no_model_has_is_refused_by_its_key(
    key: str, value: float, tmp_path: Path
) -> None:
    folder, root = copy_model(tmp_path / "model"), tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    outcome = invoke(*arguments(root, {"source.checkpoint": str(folder)}), "--dry-run")
    words = [f"config.json: text_config.{key}: expected at most ", "found"]
    assert_refused(outcome, words, root)


def test_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    outcome = invoke(*arguments(tmp_path / "run", {"source.checkpoint": str(tmp_path / "nowhere")}))
    assert_refused(
        outcome, ["config.json", str(tmp_path / "nowhere"), "found none"], tmp_path / "run"
    )


def narrow_model(folder: Path, size: int) -> None:
    """The sample with bf16 experts of another intermediate size."""
    config = json.loads((TINY / "config.json").read_text())
    del config["text_config"]["quantization_config"]
    config["text_config"]["moe_intermediate_size"] = size

    def cut(name: str, tensor: Tensor) -> Tensor:
        if "experts." not in name:
            return tensor
        return (tensor[:, :size] if "down_proj" in name else tensor[:size]).contiguous()

    write_folder(
        folder,
        config,
        {name: cut(name, tensor) for name, tensor in plain_experts(load_tiny()).items()},
    )
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)


@pytest.mark.parametrize(("size", "span"), [(120, 16), (120, 32), (112, 32)])
def test_inputs_that_do_not_fill_a_scale_span_are_refused(
    size: int, span: int, tmp_path: Path
) -> None:
    folder, root = tmp_path / "model", tmp_path / "run"
    narrow_model(folder, size)
    outcome = invoke(
        *arguments(root, {"source.checkpoint": str(folder), "compression.scale_span": str(span)})
    )
    words = [
        f"{LAYERS}.1.mlp.experts.0.down_proj",
        f"in_features divisible by {span}",
        f"found {size}",
    ]
    assert_refused(outcome, words, root)


def test_inputs_that_fill_the_asked_scale_span_are_accepted(tmp_path: Path) -> None:
    narrow_model(tmp_path / "model", 112)
    settings = {"source.checkpoint": str(tmp_path / "model"), "compression.scale_span": "16"}
    assert invoke(*arguments(tmp_path / "run", settings), "--dry-run").code == 0


def poison_scales(folder: Path, name: str, value: float) -> str:
    """One scale of one linear becomes `value`. Returns the file."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    tensors[name][5, 1] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_stops_the_stream_by_name(value: float, tmp_path: Path) -> None:
    folder, root = copy_model(tmp_path / "model"), tmp_path / "run"
    name = f"{LAYERS}.2.mlp.experts.1.up_proj.weight_scale"
    file = poison_scales(folder, name, value)
    outcome = invoke(*arguments(root, {"source.checkpoint": str(folder)}))
    assert outcome.code == 2, outcome
    # Ray's own processes may say more there
    assert len(re.findall(r"^error: ", outcome.err, re.MULTILINE)) == 1
    for word in (file, name, "expected finite values, found 1 of"):
        assert word in outcome.err
    assert not (root / "checkpoint").exists()
    assert {path.parent.name[:4] for path in root.rglob("units/*/manifest.json")} <= {"L001"}, (
        "only what the stream had left by then"
    )


# Texts.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["expected text for 4 sequences of 64 tokens, found 0"]),
        (
            b'\n  \n{"text": ""}\n{"text": "  "}\n',
            ["expected text for 4 sequences of 64 tokens, found 0"],
        ),
        (b'{"text": "too short"}\n', ["expected text for 4 sequences of 64 tokens, found 0"]),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', ["line 2", "not UTF-8"]),
        (
            b'{"text": "fine"}\nplain words\n',
            ["line 2", "expected a JSON object", "plain words"],
        ),
        (
            b'{"text": "fine"}\n{"txt": "misspelt"}\n',
            ["line 2", "expected a column 'messages' or 'conversations' or 'text', found txt"],
        ),
        (b'["text"]\n', ["line 1", "expected a JSON object"]),
        (b'{"text": 7}\n', ["line 1", "'text': expected a text, found a number"]),
        (b'{"text": "half a pair: \\ud83d"}\n', ["line 1", "lone surrogate"]),
        (b"[" * 100_000 + b"\n", ["line 1", "expected a JSON object"]),
    ],
    ids=[
        "empty",
        "blank",
        "short",
        "latin1",
        "not_json",
        "no_text",
        "list",
        "number",
        "surrogate",
        "deep",
    ],
)
def test_unusable_text_is_refused_by_file_and_line(
    data: bytes, words: list[str], tmp_path: Path
) -> None:
    path, root = tmp_path / "texts.jsonl", tmp_path / "run"
    path.write_bytes(data)
    outcome = invoke(*arguments(root, {"calibration.documents": str(path)}))
    assert_refused(outcome, ["calibration.documents", str(path), *words], root)


def test_unusable_held_out_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, root = tmp_path / "texts.jsonl", tmp_path / "run"
    path.write_text("plain words")
    outcome = invoke(
        *arguments(
            root, {"evaluation": f"{{documents: {path}, num_sequences: 2, sequence_length: 64}}"}
        )
    )
    assert_refused(outcome, ["evaluation.documents", str(path), "line 1", "plain words"], root)


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize("section", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"plain words\n", ["line 1", "plain words"]),
        ("a.parquet", b"plain words\n", ["not a Parquet file"]),
        ("a.txt", b"plain words\n", ["expected a file, or a folder with .jsonl, .jsonl.gz"]),
    ],
)
def test_folder_of_texts_that_can_not_be_read_is_refused_by_a_dry_run_too(
    name: str, data: bytes, words: list[str], section: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    folder, root = tmp_path / "texts", tmp_path / "run"
    folder.mkdir()
    (folder / name).write_bytes(data)
    key = f"{section}.documents"
    settings = {
        "calibration": {key: str(folder)},
        "evaluation": {
            "evaluation": f"{{documents: {folder}, num_sequences: 2, sequence_length: 64}}"
        },
    }[section]
    assert_refused(invoke(*arguments(root, settings), *args), [key, *words], root)


@pytest.mark.parametrize(
    "path", ["s3://", "s3:///a.jsonl", "gs://bucket/a.jsonl", "hf://datasets/a"]
)
def test_texts_in_a_place_that_can_not_be_meant_are_refused_by_a_dry_run(
    path: str, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    outcome = invoke(*arguments(root, {"calibration.documents": path}), "--dry-run")
    assert_refused(outcome, ["calibration.documents", path], root)


@pytest.mark.parametrize("args", [(), ("--dry-run",)], ids=["run", "dry"])
def test_text_that_is_not_there_is_refused(args: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "run"
    settings = {"calibration.documents": str(tmp_path / "none.jsonl")}
    outcome = invoke(*arguments(root, settings), *args)
    assert_refused(
        outcome, ["calibration.documents", str(tmp_path / "none.jsonl"), "No such file"], root
    )


# The run root.


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("compression.sweeps", "2", ["compression.sweeps", "2", "1"]),
        ("compression.damp", "0.25", ["compression.damp", "0.25", "'auto'"]),
        ("calibration.num_sequences", "6", ["calibration.num_sequences", "6", "4"]),
        ("run.experts_per_unit", "8", ["run.experts_per_unit", "8", "4"]),
        ("run.threads_per_worker", "2", ["run.threads_per_worker", "2", "1"]),
    ],
)
def test_run_root_of_another_plan_is_refused_by_setting_and_left_alone(
    key: str, value: str, words: list[str], finished_once: Path
) -> None:
    before = snapshot(finished_once)
    outcome = invoke(*arguments(finished_once, {key: value}))
    assert outcome.code == 2, outcome
    setting, ours, theirs = words
    assert f"another plan: {setting}: expected {ours} (this run), found {theirs}" in outcome.err
    assert str(finished_once / "plan.json") in outcome.err
    assert snapshot(finished_once) == before


def test_run_root_of_another_source_is_refused_and_left_alone(
    finished_once: Path, tmp_path: Path
) -> None:
    folder = copy_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    (folder / "config.json").write_text(json.dumps(config))
    before = snapshot(finished_once)
    outcome = invoke(*arguments(finished_once, {"source.checkpoint": str(folder)}))
    assert (outcome.code, "another plan: source fingerprint: expected" in outcome.err) == (
        2,
        True,
    ), outcome
    assert snapshot(finished_once) == before


def test_run_root_of_other_texts_is_refused_and_left_alone(
    finished_once: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes((TINY / "calibration.jsonl").read_bytes() + b'{"text": "one more"}\n')
    before = snapshot(finished_once)
    outcome = invoke(*arguments(finished_once, {"calibration.documents": str(path)}))
    assert (
        outcome.code,
        "another plan: calibration documents' digest: expected" in outcome.err,
    ) == (2, True), outcome
    assert snapshot(finished_once) == before


# The exit code that a shell sees.


@pytest.mark.slow
def test_shell_sees_exit_code_2_for_an_unknown_key(tmp_path: Path) -> None:
    outcome = run_process(*arguments(tmp_path / "run", {"compression.dampp": "0.1"}))
    assert_refused(outcome, [str(CONFIG), "compression.dampp: unknown key"], tmp_path / "run")


@pytest.mark.slow
def test_shell_sees_exit_code_2_for_a_truncated_shard(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    truncate_shard(folder)
    outcome = run_process(*arguments(tmp_path / "run", {"source.checkpoint": str(folder)}))
    assert_refused(outcome, [SHARD, "truncated"], tmp_path / "run")


@pytest.mark.ray
def test_shell_sees_exit_code_2_for_scales_that_workers_find_not_finite(tmp_path: Path) -> None:
    folder, root = copy_model(tmp_path / "model"), tmp_path / "run"
    name = f"{LAYERS}.1.mlp.experts.2.gate_proj.weight_scale"
    poison_scales(folder, name, float("nan"))
    outcome = run_process(*arguments(root, {"source.checkpoint": str(folder)}))
    assert outcome.code == 2, outcome
    assert f"{name}: expected finite values, found 1 of" in outcome.err
    assert not (root / "checkpoint").exists()
    assert not list(root.rglob("units/*/manifest.json"))


@pytest.mark.ray
def test_text_found_bad_while_workers_start_leaves_no_run_root_and_no_ray_behind(
    tmp_path: Path,
) -> None:
    """Texts are packed beside the start of Ray and its workers."""
    path, root = tmp_path / "texts.jsonl", tmp_path / "run"
    path.write_text('{"text": "fine"}\nplain words\n')
    mark = {"P48RAY_TEST_MARK": str(tmp_path)}
    outcome = run_process(*arguments(root, {"calibration.documents": str(path)}), env=mark)
    assert_refused(outcome, ["calibration.documents", str(path), "line 2", "plain words"], root)
    deadline = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def marked(mark: dict[str, str]) -> list[str]:
    """Processes that are alive and inherited an environment variable."""
    found: list[str] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and mark.items() <= process.environ().items()
            ):
                found.append(" ".join(process.cmdline())[:200])
    return found
