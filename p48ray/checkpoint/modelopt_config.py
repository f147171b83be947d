"""config.json and hf_quant_config.json as ModelOpt's export writes them for NVFP4, made from the
quantization_config of a finished checkpoint.

What stays plain is named there by wildcards (fnmatch), not by regular expressions. Both say the
same: the wildcards are our `ignore` patterns (checkpoint.ignore), written out. vLLM takes a name
without an asterisk for a part of any name: `check_wildcards` holds it against the experts' so, too.

The older file, hf_quant_config.json, is the one that TensorRT-LLM reads; vLLM and SGLang go by
config.json, and know either by the producer's name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import Any

from p48ray.checkpoint.index import CONFIG_FILE, CONFIG_KEY
from p48ray.checkpoint.modelopt import Form
from p48ray.checkpoint.output_config import CACHE_KEY, IGNORE_KEY, NVFP4_FORMAT
from p48ray.checkpoint.sparse_storage import GROUP_SIZE, storage_of
from p48ray.errors import SourceError

HF_QUANT_FILE = "hf_quant_config.json"
METHOD, ALGORITHM = "modelopt", "NVFP4"
PRODUCER = {"name": METHOD, "version": "0.47.0"}
"""By its name readers know the file; the version is the one whose layout this is. Who made the
checkpoint, p48ray.json says."""


_FREE_START = r"(.*\.)?"
_CHOICE = re.compile(r"\(((?:[\w\\-]|\.(?!\*)|\|)+)\)")
_LITERAL = re.compile(r"(?:\*|\.|[\w-])+")


def form_of(config: Mapping[str, Any]) -> Form:
    """What a checkpoint's config.json announces. Raises: SourceError for what is neither format, or
    a sparse storage of another layout or version."""
    if problem := format_problem(config):
        raise SourceError(problem)
    return "modelopt" if config[CONFIG_KEY].get("quant_method") == METHOD else storage_of(config)


def format_problem(config: Mapping[str, Any]) -> str | None:
    """Why a config.json announces neither format; None where it does."""
    found = config.get(CONFIG_KEY)
    found = found if isinstance(found, Mapping) else {}
    method, algorithm = found.get("quant_method"), found.get("quant_algo")
    if (method, algorithm) == (METHOD, ALGORITHM) or (
        found.get("format") == NVFP4_FORMAT and method != METHOD
    ):
        return None
    return (
        f"{CONFIG_FILE}: {CONFIG_KEY}.format: expected {NVFP4_FORMAT!r}, or quant_method"
        f" {METHOD!r} with quant_algo {ALGORITHM!r}, found {found.get('format')!r}, quant_method"
        f" {method!r}, quant_algo {algorithm!r}"
    )


def modelopt_files(
    config: Mapping[str, Any], linears: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and hf_quant_config.json for a checkpoint whose config.json this is. linears:
    that are compressed.

    Raises: SourceError, naming the key, for what ModelOpt's files can not say.
    """
    quantization = config[CONFIG_KEY]
    exclude, cache = wildcards(quantization.get(IGNORE_KEY)), quantization.get(CACHE_KEY)
    check_wildcards(exclude, linears)
    is_fp8 = is_fp8_cache(cache)
    group_size = GROUP_SIZE["dense"]
    quantizer = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": group_size}
    ours = {
        "config_groups": {
            "group_0": {
                "input_activations": quantizer,
                "weights": dict(quantizer),
                "targets": ["Linear"],
            }
        },
        IGNORE_KEY: exclude,
        "quant_algo": ALGORITHM,
        **({CACHE_KEY: {"dynamic": False, "num_bits": 8, "type": "float"}} if is_fp8 else {}),
        "producer": dict(PRODUCER),
        "quant_method": METHOD,
    }
    older = {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": ALGORITHM,
            "kv_cache_quant_algo": "FP8" if is_fp8 else None,
            "group_size": group_size,
            "exclude_modules": list(exclude),
        },
    }
    return {**config, CONFIG_KEY: ours}, older


def restored_config(config: Mapping[str, Any], quantization: str) -> dict[str, Any]:
    """config.json with the quantization_config that it had. quantization: its JSON, keys in
    order."""
    return {**config, CONFIG_KEY: json.loads(quantization)}


def is_fp8_cache(scheme: object) -> bool:
    """Whether keys and values are cached in FP8, with scales of the checkpoint.

    Raises: SourceError for another kv_cache_scheme.
    """
    if scheme is None:
        return False
    expected = {"num_bits": 8, "type": "float", "dynamic": False}
    if isinstance(scheme, Mapping) and expected.items() <= scheme.items():
        return True
    raise SourceError(
        f"{CONFIG_FILE}: {CONFIG_KEY}.{CACHE_KEY}: expected null or {expected} for ModelOpt's"
        f" layout, found {scheme!r}"
    )


def wildcards(patterns: object) -> list[str]:
    """`ignore` patterns as wildcards for a whole name, which hold for the same names.

    Raises: SourceError for an empty list (readers would take every linear for NVFP4), and for a
        pattern that no wildcards can say.
    """
    if not isinstance(patterns, list) or not patterns:
        raise SourceError(
            f"{CONFIG_FILE}: {CONFIG_KEY}.{IGNORE_KEY}: expected names of all linears outside the"
            f" experts, because readers of ModelOpt's layout take all others for NVFP4, found"
            f" {patterns!r}; p48ray update-config CHECKPOINT fills an empty list"
        )
    return list(dict.fromkeys(one for pattern in patterns for one in _written_out(pattern)))


def check_wildcards(patterns: Iterable[str], linears: Iterable[str]) -> None:
    """Raises: SourceError, naming both, if a wildcard holds for a compressed linear or a mixture of
    them, or stands in its name."""
    names = dict.fromkeys(n for linear in linears for n in (linear, linear.rsplit(".", 2)[0]))
    for pattern in patterns:
        holds = re.compile(translate(pattern)).match
        for name in names:
            if holds(name) or pattern in name:
                raise SourceError(
                    f"{CONFIG_FILE}: {CONFIG_KEY}.{IGNORE_KEY}: expected names outside the"
                    f" compressed experts, found {pattern!r}, which readers take for {name} as well"
                )


def _written_out(pattern: object) -> Iterable[str]:
    text = pattern if isinstance(pattern, str) else ""
    if not text.startswith("re:"):
        found = [text]
    else:
        text = text.removeprefix("re:")
        starts = ["", "*."] if text.startswith(_FREE_START) else [""]
        body = text.removeprefix(_FREE_START)
        is_open = body.endswith(".*")
        choice = _CHOICE.search(body)
        bodies = (
            [body[: choice.start()] + one + body[choice.end() :] for one in choice[1].split("|")]
            if choice
            else [body]
        )
        found = [start + _plain(one) for start in starts for one in bodies]
        if not (is_open or body.endswith("$")):
            found = [""]  # holds for what goes on behind it as well
    if not all(_LITERAL.fullmatch(one) for one in found):
        raise SourceError(
            f"{CONFIG_FILE}: {CONFIG_KEY}.{IGNORE_KEY}: expected names, or regular expressions of"
            rf" names, '.*' and (one|another) that end in '$' or '.*', found {pattern!r}"
        )
    return found


def _plain(body: str) -> str:
    """A regular expression without choices as a wildcard; what is left of others is no literal."""
    body = body.removesuffix("$").replace(".*", "*")
    # a bare dot stands for any character, and no wildcard here says that
    bare = re.search(r"(?<!\\)\.", body)
    return "" if bare else re.sub(r"\\([.\-])", r"\1", body)
