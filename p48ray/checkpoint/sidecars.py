"""Files beside the weights of a checkpoint: which of them go with any weights of the model, and so
into the compressed checkpoint, and which stay behind.

    carried   tokenizer, processors, generation config, chat templates, code, licence and policies
    left      what speaks of these weights or of how they were made (LEFT_NAMES), other forms of the
              weights, texts, pictures, folders

Folders are left but for chat templates and for code that `auto_map` names. Hidden files, and names
that could lead out of a folder, are never touched.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from p48ray.checkpoint.header import json_object
from p48ray.errors import SourceError
from p48ray.store import Store

OTHER_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pickle",
    ".pkl",
)
"""Endings of files that hold or describe weights, in any client's form; some are pickles. Those of
the uncompressed model are not carried over."""

LEFT_NAMES = (
    # of p48ray's own run roots and outputs
    "plan.json",
    "store.json",
    "p48ray.json",
    "p48ray-convert.json",
    # quantization of these weights, which config.json of the output tells otherwise
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    # weights in another form: a server that finds it may read the model in that form
    "params.json",
    "mlc-chat-config.json",
    # adapters
    "adapter_config.json",
    # training
    "trainer_state.json",
    "training_args.json",
    "train_results.json",
    "eval_results.json",
    "test_results.json",
    "all_results.json",
    "zero_to_fp32.py",
    "optimizer*",
    "scheduler.*",
    "rng_state*",
)
"""Names, in small letters, of files that speak of these weights or of how they were made."""

_CARRIED = (".json", ".py", ".jinja", ".model", ".tiktoken", ".txt")
_CARRIED_NAMES = re.compile(r"vocab\.bpe|.+\.model\.v\d+(m\d+)?")
"""GPT-2's merges; Mistral's tokenizers by version: tokenizer.model.v3, ...model.v7m1."""
_NOTICES = ("LICENSE", "LICENCE", "NOTICE", "THIRD_PARTY", "COPYING")
_POLICY = "POLICY"
CHAT_TEMPLATES = "additional_chat_templates/"
"""transformers' folder of templates by name."""
_PLAIN_PATH = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
_AUTO_MAP = "auto_map"
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w[\w.]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Names in a checkpoint's folder, sorted; hidden files are in neither."""

    carried: tuple[str, ...]
    left: tuple[str, ...]


def find_sidecars(store: Store, config: Mapping[str, Any], apart: Collection[str]) -> Sidecars:
    """What lies beside the weights.

    Args:
        store: rooted at the folder.
        config: its config.json.
        apart: names that are no sidecars: config, index, card, weights.
    """
    names = sorted(info.key for info in store.list() if not _is_hidden(info.key))
    wanted = [name for name in names if name not in apart]
    carried = {name for name in wanted if is_carried(name)}
    nested = {name for name in wanted if "/" in name and name.endswith(".py")}
    if nested:  # else nothing of it is read
        carried |= code_files(store, config, carried, nested)
    return Sidecars(tuple(sorted(carried)), tuple(n for n in wanted if n not in carried))


def is_carried(name: str) -> bool:
    """Whether a file goes with any weights of its model, by its name alone."""
    lower = name.lower()
    if lower.endswith(OTHER_WEIGHTS) or any(fnmatchcase(lower, left) for left in LEFT_NAMES):
        return False
    if "/" in name:
        is_template = name.startswith(CHAT_TEMPLATES) and name.endswith(".jinja")
        return is_template and _PLAIN_PATH.fullmatch(name) is not None
    return (
        name.endswith(_CARRIED)
        or _CARRIED_NAMES.fullmatch(name) is not None
        or name.upper().startswith(_NOTICES)
        or _POLICY in name.upper()
    )


def code_files(
    store: Store, config: Mapping[str, Any], carried: Collection[str], nested: Collection[str]
) -> set[str]:
    """All code of the folders that a model's classes lie in: those of the modules that `auto_map`
    names, and of what carried modules import beside them (`from .folder.module import name`).

    Args:
        store: rooted at the checkpoint's folder.
        config: its config.json.
        carried: names of the small files at its top.
        nested: names of all files of code in folders.
    """
    named = [r.rpartition(".")[0] for r in auto_map_values(store, config, carried)]
    for name in carried:
        if name.endswith(".py"):
            text = store.get(name).decode("utf-8", errors="replace")
            named += _RELATIVE_IMPORT.findall(text)
    # transformers reads folder/module.Class, others folder.module.Class
    modules = {module.replace(".", "/") for module in named}
    folders = {
        f"{module.partition('/')[0]}/"
        for module in modules
        if any(file == f"{module}.py" or file.startswith(f"{module}/") for file in nested)
    }
    return {
        file for file in nested if file.startswith(tuple(folders)) and _PLAIN_PATH.fullmatch(file)
    }


def auto_map_values(
    store: Store, config: Mapping[str, Any], carried: Iterable[str]
) -> Iterator[str]:
    """Every `module.Class` of this folder that its JSON files map a class of transformers to; those
    of another repository (owner/name--module.Class) are not here."""
    settings: list[Mapping[str, Any]] = [config]
    for name in carried:
        if name.endswith("_config.json"):
            try:
                settings.append(json_object(name, store.get(name), unique_keys=False))
            except SourceError:
                continue  # whoever needs it says so
    while settings:
        values = settings.pop()
        settings += [value for value in values.values() if isinstance(value, dict)]
        found = values.get(_AUTO_MAP)
        mapped = list(found.values()) if isinstance(found, dict) else [found]
        for reference in (r for m in mapped for r in (m if isinstance(m, list) else [m])):
            if isinstance(reference, str) and "--" not in reference:
                yield reference


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
