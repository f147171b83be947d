"""Which files beside the weights are carried over, by what folders on the Hub hold."""

import json
import uuid

import pytest

from p48ray.checkpoint.sidecars import find_sidecars
from p48ray.store import MemoryStore

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v7m1",
    "mistral_instruct_tokenizer_240323.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.bpe",
    "merges.txt",
    "vocab.txt",
    "modeling_x.py",
    "LICENSE",
    "LICENSE.pdf",
    "License.md",
    "NOTICE.md",
    "THIRD_PARTY_NOTICES.md",
    "COPYING",
    "USE_POLICY.md",
    "ACCEPTABLE_USE_POLICY.pdf",
)
LEFT = (
    "plan.json",
    "store.json",
    "p48ray.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
    "all_results.json",
    "eval_results.json",
    "params.json",
    "consolidated.00.pth",
    "zero_to_fp32.py",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "rng_state.json",
    "optimizer/state.json",
    "global_step100/zero.json",
    "pytorch_model.bin.index.json",
    "x.gguf",
    "latest",
    "calibration.jsonl",
    "figures/logo.png",
    "units/L001-E000-003/manifest.json",
    "report/report.json",
    "inference/generate.py",
    "additional_chat_templates/notes.txt",
    "additional_chat_templates/deeper/x y.jinja",
    "1_Pooling/config.json",
)
HIDDEN = (".gitattributes", ".cache/x.json", "additional_chat_templates/.hidden.jinja")


def store_of(files: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore(uuid.uuid4().hex)
    for name, data in files.items():
        store.put(name, data)
    return store


def carried(files: dict[str, str], config: dict[str, object] | None = None) -> set[str]:
    store = store_of({name: text.encode() for name, text in files.items()})
    return set(find_sidecars(store, config or {}, ()).carried)


def test_every_small_file_of_kimis_release_is_carried() -> None:
    """Of the kimi_k25 releases; what they hold besides is weights, and texts and pictures."""
    names = [
        "LICENSE",
        "THIRD_PARTY_NOTICES.md",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "configuration_kimi_k25.py",
        "generation_config.json",
        "kimi_k25_processor.py",
        "kimi_k25_vision_processing.py",
        "media_utils.py",
        "modeling_deepseek.py",
        "modeling_kimi_k25.py",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tiktoken.model",
        "tokenization_kimi.py",
        "tokenizer_config.json",
        "tool_declaration_ts.py",
    ]
    assert carried(dict.fromkeys([*names, "docs/deploy_guidance.md"], "{}")) == set(names)


def test_every_name_is_carried_or_left_or_hidden() -> None:
    names = [*CARRIED, *LEFT, *HIDDEN, "config.json", "model.safetensors"]
    found = find_sidecars(
        store_of(dict.fromkeys(names, b"{}")), {}, {"config.json", "model.safetensors"}
    )
    assert found.carried == tuple(sorted(CARRIED))
    assert found.left == tuple(sorted(LEFT))


CODE = {
    "modeling_x.py": "import torch\n",
    "code/__init__.py": "",
    "code/modeling.py": "from .parts import Part\n",
    "code/parts.py": "",
    "code/deeper/kernel.py": "",
    "other/tool.py": "",
    "code/readme.md": "",
    "code/.hidden.py": "",
}
CODE_FOLDER = {"code/__init__.py", "code/modeling.py", "code/parts.py", "code/deeper/kernel.py"}


@pytest.mark.parametrize(
    "reference",
    [
        "code/modeling.Model",
        "code.modeling.Model",
        "code.Model",
        [None, "code/modeling.Fast"],
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "nested"])
def test_folder_of_code_that_auto_map_names_is_carried_whole(reference: object, file: str) -> None:
    settings: dict[str, object] = {"auto_map": {"AutoModel": "modeling_x.Model", "Auto": reference}}
    if file == "nested":
        settings = {"text_config": {"vision": settings}}
    beside = {file: json.dumps(settings)} if file == "tokenizer_config.json" else {}
    found = carried(CODE | beside, {} if beside else settings)
    assert found == {"modeling_x.py", *CODE_FOLDER, *beside}


@pytest.mark.parametrize(
    ("line", "is_carried"),
    [
        ("from .code.parts import Part", True),
        ("    from .code.deeper.kernel import run", True),
        ("from .code import parts", True),
        ("import .code.parts", True),
        ("from code.parts import Part", False),
        ("from .coder import Part", False),
        ("# from .code.parts import Part", False),
    ],
)
def test_folder_that_a_module_imports_beside_it_is_carried(line: str, is_carried: bool) -> None:
    files = CODE | {"modeling_x.py": f"import torch\n{line}\n"}
    assert carried(files) == {"modeling_x.py", *(CODE_FOLDER if is_carried else ())}


def test_old_form_of_auto_map_is_one_name() -> None:
    assert carried(CODE, {"auto_map": "code/modeling.Model"}) >= CODE_FOLDER


@pytest.mark.parametrize(
    "reference",
    [
        "owner/name--code/modeling.Model",
        "missing.Model",
        "../code/modeling.Model",
        "",
        ".",
        7,
        None,
    ],
    ids=str,
)
def test_what_is_not_in_this_folder_carries_nothing(reference: object) -> None:
    assert carried(CODE, {"auto_map": {"AutoModel": reference}}) == {"modeling_x.py"}


def test_settings_that_are_no_json_stop_nothing() -> None:
    """Whoever needs such a file says what is wrong with it."""
    assert carried(CODE | {"broken_config.json": "{"}) == {"modeling_x.py", "broken_config.json"}
