"""What ModelOpt's files say: the wildcards hold for the names that our patterns hold for, and for
no other."""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CONFIG_KEY, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.modelopt_config import (
    check_wildcards,
    form_of,
    is_fp8_cache,
    modelopt_files,
    restored_config,
    wildcards,
)
from p48ray.checkpoint.output_config import output_config
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.errors import SourceError
from p48ray.store import LocalStore
from tests.checkpoint.test_ignore import SOURCES, other_names, plain_linears
from tests.checkpoint.tiny_variants import write_folder
from tests.reference import tiny_families

EXPERT = "model.layers.1.mlp.experts.0.up_proj"


@pytest.mark.parametrize("name", SOURCES)
def test_wildcards_hold_for_every_plain_linear_and_for_no_expert(name: str, tmp_path: Path) -> None:
    if name == SOURCES[-1]:
        write_kimi_k25_skeleton(tmp_path / "model")
    else:
        write_folder(tmp_path / "model", *getattr(tiny_families, name)())
    index = open_checkpoint(LocalStore(tmp_path / "model"))
    layout = describe_model(index)
    config = output_config(index, layout)
    patterns = config[CONFIG_KEY]["ignore"]
    experts = {
        layout.expert_linear_name(layer, expert, p)
        for layer in layout.moe_layers
        for expert in (0, layout.num_experts - 1)
        for p in PROJECTIONS
    }
    found = wildcards(patterns)
    check_wildcards(found, experts)

    def is_named(module: str) -> bool:
        by_wildcard = any(fnmatchcase(module, one) for one in found)
        assert by_wildcard == any(re.match(p.removeprefix("re:"), module) for p in patterns)
        return by_wildcard

    plain = {n for one in plain_linears(index, layout) for n in other_names(one)}
    assert len(plain) > 20 and [n for n in sorted(plain) if not is_named(n)] == []
    mixtures = {n.rsplit(".", 2)[0] for n in experts}
    assert [n for n in sorted(experts | mixtures) if is_named(n)] == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:.*\.mlp\.(gate|up_proj)$", ["*.mlp.gate", "*.mlp.up_proj"]),
        (r"re:(.*\.)?lm_head$", ["lm_head", "*.lm_head"]),
        (r"re:(.*\.)?mm\-projector\..*", ["mm-projector.*", "*.mm-projector.*"]),
        (r"re:.*\.(eh_proj|shared_head\.head)$", ["*.eh_proj", "*.shared_head.head"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns_are_written_out(pattern: str, expected: list[str]) -> None:
    assert wildcards([pattern]) == expected


@pytest.mark.parametrize(
    "pattern",
    [r"re:.*\.mlp", "re:a.b$", "re:[ab]$", "re:a+$", "a?b", "re:(a|b)(c|d)$", "", 3, "re:(a|.*)$"],
)
def test_patterns_that_wildcards_can_not_say_are_refused_by_name(pattern: object) -> None:
    with pytest.raises(SourceError, match=re.escape(f"found {pattern!r}")):
        wildcards([pattern])


@pytest.mark.parametrize("patterns", [[], None])
def test_empty_list_is_refused(patterns: object) -> None:
    with pytest.raises(SourceError, match=r"quantization_config\.ignore: expected names"):
        wildcards(patterns)


@pytest.mark.parametrize("wildcard", ["*.mlp.*", "experts", "*.experts", "*up_proj"])
def test_wildcard_that_takes_an_expert_is_refused_by_both_names(wildcard: str) -> None:
    with pytest.raises(SourceError, match=re.escape(repr(wildcard))):
        check_wildcards(["lm_head", wildcard], [EXPERT])


def compressed(cache: object = None) -> dict:
    return {
        "model_type": "x",
        CONFIG_KEY: {
            "format": "nvfp4-pack-quantized",
            "ignore": [r"re:(.*\.)?lm_head$"],
            "kv_cache_scheme": cache,
        },
        "last": 1,
    }


FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize(("cache", "algorithm"), [(None, None), (FP8, "FP8")])
def test_both_files_say_the_same(cache: object, algorithm: str | None) -> None:
    config, older = modelopt_files(compressed(cache), [EXPERT])
    ours, theirs = config[CONFIG_KEY], older["quantization"]
    assert list(config) == list(compressed())
    assert ours["quant_method"] == "modelopt" and ours["quant_algo"] == "NVFP4"
    assert ours["ignore"] == theirs["exclude_modules"] == ["lm_head", "*.lm_head"]
    assert ("kv_cache_scheme" in ours) == (algorithm is not None)
    assert theirs["kv_cache_quant_algo"] == algorithm and theirs["group_size"] == 16
    assert (form_of(config), form_of(compressed())) == ("modelopt", "dense")


def test_config_comes_back() -> None:
    config, _ = modelopt_files(compressed(), [EXPERT])
    again = restored_config(config, '{"b": 1, "a": 2}')
    assert list(again) == list(compressed()) and list(again[CONFIG_KEY]) == ["b", "a"]


@pytest.mark.parametrize("scheme", ["FP8", FP8 | {"num_bits": 4}, FP8 | {"dynamic": True}])
def test_other_caches_are_refused(scheme: object) -> None:
    with pytest.raises(SourceError, match=r"quantization_config\.kv_cache_scheme: expected null"):
        is_fp8_cache(scheme)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop(CONFIG_KEY),
        lambda c: c.update({CONFIG_KEY: "nvfp4"}),
        lambda c: c[CONFIG_KEY].update(format="pack-quantized"),
        lambda c: c.update({CONFIG_KEY: {"quant_method": "modelopt", "quant_algo": "FP8"}}),
    ],
)
def test_config_of_neither_format_is_refused(change: Callable[[dict], object]) -> None:
    config = compressed()
    change(config)
    with pytest.raises(SourceError, match=r"config\.format: expected .*, found .*quant_algo"):
        form_of(config)
