"""Families are found by their files, and each says of its layers what its model's code does."""

import sys
from pathlib import Path

import pytest

from p48ray.checkpoint.families import FAMILIES, Family, describe_model
from p48ray.checkpoint.families.qwen3_moe import sparse_layers
from p48ray.checkpoint.families.record import TextConfig
from p48ray.checkpoint.families.registry import find_families
from p48ray.checkpoint.index import open_checkpoint
from p48ray.errors import P48Error, SourceError
from p48ray.model.architecture import architecture
from p48ray.store import LocalStore
from tests.conftest import REPO
from tests.reference import tiny_families

FOLDER = REPO / "p48ray" / "checkpoint" / "families"
NEW = """
from dataclasses import replace
from p48ray.checkpoint.families.qwen3_moe import FAMILY as base
FAMILY = {value}
"""


def write_package(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> str:
    package = f"families_{folder.name.replace('-', '_')}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("")
    for name, text in files.items():
        (folder / package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return package


def test_families_are_those_that_have_a_file() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "record", "registry"}
    assert list(FAMILIES) == sorted(files)
    assert all(family.model_type == name for name, family in FAMILIES.items())


def test_documentation_shows_a_familys_file_as_it_is() -> None:
    shown = (
        (REPO / "docs" / "families.md").read_text().partition("```python\n")[2].partition("```")[0]
    )
    assert shown == (FOLDER / "qwen3_moe.py").read_text()


def test_documentation_names_every_family() -> None:
    text = (REPO / "docs" / "families.md").read_text()
    assert all(f"| `{name}` |" in text for name in FAMILIES)


def test_a_new_file_is_a_new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_package(
        tmp_path,
        monkeypatch,
        other=NEW.format(value="replace(base, model_type='other')"),
        notes="X = 1",
    )
    assert list(find_families(package)) == ["other"]


def test_two_files_of_one_family_and_a_family_that_is_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = write_package(
        tmp_path, monkeypatch, a=NEW.format(value="base"), b=NEW.format(value="base")
    )
    with pytest.raises(P48Error, match=rf"^{twice}\.b: model_type 'qwen3_moe' has a file already"):
        find_families(twice)
    (tmp_path / "second").mkdir()
    wrong = write_package(tmp_path / "second", monkeypatch, a="FAMILY = 'qwen3_moe'")
    with pytest.raises(P48Error, match=rf"^{wrong}\.a: expected FAMILY to be a Family, found str"):
        find_families(wrong)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_transformers_has_the_classes_that_a_family_names(family: Family) -> None:
    found = architecture(family)
    assert [c.__name__ for c in found] == [
        getattr(family.transformers, name) for name in ("config", "layer", "rotary", "norm")
    ]


def test_class_that_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    family = FAMILIES["qwen3_moe"]
    for change in ({"layer": "Qwen3MoeBlock"}, {"module": "transformers.models.qwen3_moe.nothing"}):
        broken = replace(family, transformers=replace(family.transformers, **change))
        with pytest.raises(
            P48Error,
            match=(
                r"family qwen3_moe: transformers \S+ has not what its file names:"
                rf" .*{next(iter(change.values()))}"
            ),
        ):
            architecture(broken)


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_releases_layouts_are_described(tmp_path: Path, name: str) -> None:
    layout = describe_model(
        open_checkpoint(LocalStore(tiny_families.write_release(name, tmp_path / name)))
    )
    assert (layout.family, layout.moe_layers) == (name, tiny_families.moe_layers(name))
    assert (layout.num_layers, layout.num_experts, layout.top_k) == (3, 8, 3)
    assert layout.layer_prefix == (
        "language_model.model.layers." if name == "kimi_k25" else "model.layers."
    )
    assert layout.expert_storage == {"kimi_k25": "int4", "qwen3_moe": "bf16"}.get(name, "fp8")
    linears = {
        layout.expert_linear_name(n, e, p)
        for n in layout.moe_layers
        for e in range(8)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    assert linears == set(tiny_families.expert_linears(name))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (5,)),
        ({"mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_qwen3s_mixtures_are_those_of_transformers(
    values: dict[str, object], expected: tuple[int, ...]
) -> None:
    """Against the model's own class, built without weights."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    assert tuple(sparse_layers(TextConfig({"num_hidden_layers": 6} | values))) == expected
    config = Qwen3MoeConfig(num_hidden_layers=6, hidden_size=32, num_experts=4, **values)
    with torch.device("meta"):
        layers = [Qwen3MoeDecoderLayer(config, number) for number in range(6)]
    assert tuple(n for n, layer in enumerate(layers) if hasattr(layer.mlp, "experts")) == expected


def test_qwen3s_bad_settings_are_named() -> None:
    for values, message in (
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer >= 1, found 0"),
        (
            {"mlp_only_layers": [1, -1]},
            r"mlp_only_layers: expected a list of integers >= 0, found \[1, -1\]",
        ),
        ({"mlp_only_layers": 3}, "mlp_only_layers: expected a list of integers >= 0, found 3"),
    ):
        with pytest.raises(SourceError, match=rf"^config\.json: {message}"):
            tuple(sparse_layers(TextConfig({"num_hidden_layers": 6} | values)))
    with pytest.raises(
        SourceError,
        match=r"use_sliding_window: expected False or None for model_type qwen3_moe, found True",
    ):
        FAMILIES["qwen3_moe"].check_supported(TextConfig({"use_sliding_window": True}))
