"""Files in folders that go with the weights, all the way: from a repository on the Hub through the
mirror into a checkpoint that verifies, converts and is published; and what stays behind."""

import json
from pathlib import Path

import pytest

from p48ray.checkpoint.index import open_checkpoint
from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.store import LocalStore
from p48ray.texts.sequences import load_tokenizer
from tests.finished.publish_command import invoke_publish
from tests.jobs.command import ROUNDED, arguments, invoke
from tests.servers.hub import MODEL, Hub, tiny_files
from tests.texts.tiktoken_source import CODE, model_files

pytestmark = [pytest.mark.server, pytest.mark.slow]

RESULT = "owner/tiny-p48"
CARRIED = {
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}\n",
    "code/modeling.py": b"raise RuntimeError('code of a source must not run')\n",
    "code/parts.py": b"",
    "tokenizer.model.v3": b"of Mistral's",
    "USE_POLICY.md": b"Be kind.\n",
    "vocab.bpe": b"#version: 0.2\n",
}
LEFT = {
    "plan.json": b'{"run": "/home/someone"}',
    "trainer_state.json": b"{}",
    "hf_quant_config.json": b"{}",
    "inference/generate.py": b"",
}


NOT_RUN = b"raise RuntimeError('code of a source must not run')\n"
KIMI_CARRIED = {
    "tokenization_kimi.py": b"from .tool_declaration_ts import encode_tools_to_typescript_style\n"
    + CODE.read_bytes(),
    "tool_declaration_ts.py": b"def encode_tools_to_typescript_style(tools): ...\n",
    "chat_template.jinja": b"[BOS]{% for m in messages %}{{ m.content }}{% endfor %}",
    "configuration_deepseek.py": NOT_RUN,
    "configuration_kimi_k25.py": NOT_RUN,
    "modeling_deepseek.py": NOT_RUN,
    "modeling_kimi_k25.py": NOT_RUN,
    "kimi_k25_processor.py": b"from .media_utils import resize\n" + NOT_RUN,
    "kimi_k25_vision_processing.py": NOT_RUN,
    "media_utils.py": NOT_RUN,
    "preprocessor_config.json": b'{"auto_map": {"AutoProcessor": "kimi_k25_processor.X"}}',
    "generation_config.json": b'{"max_length": 262144, "eos_token_id": 163585}',
    "LICENSE": b"Modified MIT",
    "THIRD_PARTY_NOTICES.md": b"of others",
}
KIMI_LEFT = {"docs/deploy_guidance.md": b"", "figures/banner.png": b""}


def folders_of_files() -> dict[str, bytes]:
    """The small model with files in folders, and with what is not the model's."""
    return with_auto_map(tiny_files() | CARRIED | LEFT, "AutoModelForCausalLM", "code/modeling")


def kimis_release() -> dict[str, bytes]:
    """The small model as Kimi-K2.5 is released: the tokenizer is code on top of tiktoken, which
    imports a module beside it, and the model's own code lies there too."""
    files = model_files(tiny_files())
    del files["tokenization_ranks.py"]
    settings = json.loads(files["tokenizer_config.json"])
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.RanksTokenizer", None]}
    del settings["chat_template"]
    files |= {"tokenizer_config.json": json.dumps(settings).encode()} | KIMI_CARRIED | KIMI_LEFT
    return with_auto_map(files, "AutoConfig", "configuration_kimi_k25")


def with_auto_map(files: dict[str, bytes], kind: str, module: str) -> dict[str, bytes]:
    config = json.loads(files["config.json"]) | {"auto_map": {kind: f"{module}.Model"}}
    return files | {"config.json": json.dumps(config).encode()}


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_all_the_way(
    hub: Hub, tmp_path: Path, source: dict[str, bytes], carried: dict[str, bytes], left: set[str]
) -> Path:
    """From the Hub through the mirror into a checkpoint, its conversion and back on the Hub; what
    is carried arrives everywhere, what is left nowhere. Returns the checkpoint."""
    hub.commit(MODEL, source)
    root = tmp_path / "run"
    settings = {"source.checkpoint": f"hf://{MODEL}", "source.trust_remote_code": "true"}
    outcome = invoke(*arguments(root, ROUNDED | settings))
    assert outcome.code == 0, outcome
    assert "left behind" in outcome.out and all(name in outcome.out for name in left)
    checkpoint = root / "checkpoint"
    found = files_under(checkpoint)
    assert {name: found.get(name) for name in carried} == carried
    assert not left & (found.keys() | files_under(root / "source").keys())
    manifest = CheckpointManifest.load(LocalStore(checkpoint), "p48ray.json")
    assert manifest.file_sha256.keys() >= carried.keys()
    for original in (None, LocalStore(root / "source")):
        verdict = verify_folder(LocalStore(checkpoint), original)
        assert (verdict.problems, verdict.notes) == ((), ())
    convert_folder(LocalStore(checkpoint), LocalStore(tmp_path / "sparse"), "sparse", None)
    converted = files_under(tmp_path / "sparse")
    assert {name: converted.get(name) for name in carried} == carried
    outcome = invoke_publish(root, hub, repo=RESULT)
    assert outcome.code == 0, outcome
    published = hub.files(RESULT)
    assert {name: published.get(name) for name in found} == found
    return checkpoint


def test_files_in_folders_are_mirrored_carried_verified_converted_and_published(
    hub: Hub, tmp_path: Path
) -> None:
    check_all_the_way(hub, tmp_path, folders_of_files(), CARRIED, set(LEFT))


def test_every_side_file_of_kimis_release_arrives_and_only_the_tokenizers_code_runs(
    hub: Hub, tmp_path: Path, module_cache: Path
) -> None:
    source = kimis_release()
    carried = KIMI_CARRIED | {"tiktoken.model": source["tiktoken.model"]}
    checkpoint = check_all_the_way(hub, tmp_path, source, carried, set(KIMI_LEFT))
    tokenizer = load_tokenizer(open_checkpoint(LocalStore(checkpoint)), trust_remote_code=True)
    assert tokenizer.decode(tokenizer.encode("the rain")) == "the rain"
