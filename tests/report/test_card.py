"""The card of a finished checkpoint: what the Hub's library reads from it, and that it says what
was done and nothing else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from p48ray.config.load import load_config
from p48ray.report.card import model_card
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.stages.evaluate import CompressedQuality, EvaluationResult
from p48ray.stages.prepare import prepare
from p48ray.store import MemoryStore
from p48ray.unit.context import StageContext
from tests.conftest import TINY
from tests.stages.small_run import SmallRun, configure

QUALITY = EvaluationResult(
    num_tokens=192,
    source_perplexity=7.0,
    source_accuracy=0.57,
    compressed_perplexity=8.125,
    compressed_accuracy=0.5,
    kl=0.0625,
)


@pytest.fixture
def units(finished: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]


def context_with(finished: SmallRun, readme: bytes | None = None, **output: object) -> StageContext:
    """The run's context with another output section, and a source whose card is `readme`."""
    plan = finished.prepared.plan
    config = plan.config.model_copy(update={"output": plan.config.output.model_copy(update=output)})
    source = finished.prepared.source
    if readme is not None:
        store = MemoryStore(f"card-{len(readme)}")
        store.put("README.md", readme)
        source = replace(source, store=store)
    return replace(finished.context, plan=plan.model_copy(update={"config": config}), source=source)


def test_card_in_the_checkpoint_is_read_by_the_hubs_library(finished: SmallRun) -> None:
    card = ModelCard.load(finished.checkpoint / "README.md")
    assert card.data.library_name == "vllm", "the Hub makes transformers' snippet otherwise"
    assert {"compressed-tensors", "nvfp4", "paired-4-8-sparse", "moe"} <= set(card.data.tags)
    assert card.text.lstrip().startswith(f"# {finished.prepared.plan.config.name}\n")
    for fact in (
        "4 layers x 16 experts",
        "6 x 64 tokens",
        "`block_descent`, 1 sweeps",
        finished.prepared.plan.digest,
        finished.prepared.source.fingerprint,
    ):
        assert fact in card.text


def test_base_model_and_licence_are_carried_over(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    readme = (
        b"---\nlicense: other\nlicense_name: modified-mit\nlicense_link: LICENSE\npipeline_tag:"
        b" image-text-to-text\ntags: [theirs]\n---\n# Source\n"
    )
    card = ModelCard(
        model_card(context_with(finished, readme, base_model="owner/name"), units, None, None)
    )
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/name", "quantized")
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "modified-mit",
        "LICENSE",
    )
    assert "theirs" not in data["tags"]
    assert data["pipeline_tag"] == "image-text-to-text"
    assert (
        "derived from [owner/name](https://huggingface.co/owner/name), whose authors took no part"
        in card.text
    )
    assert "The base model's own: modified-mit. Its text is in `LICENSE`." in card.text


def test_source_without_front_matter_has_no_licence_to_carry(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    data = ModelCard(
        model_card(context_with(finished, b"# source\n"), units, None, None)
    ).data.to_dict()
    assert not {"license", "license_name", "base_model", "base_model_relation"} & data.keys()


def test_only_what_was_measured_is_in_the_table(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    context = context_with(finished)
    alone, both = (
        model_card(context, units, QUALITY, baseline)
        for baseline in (None, QUALITY.model_copy(update={"kl": 0.125}))
    )
    assert "| this checkpoint | 8.1250 | 0.5000 | 0.0625 |" in alone
    assert "sparse kernels: activations" not in alone
    other = CompressedQuality(perplexity=8.25, accuracy=0.4375, kl=0.0703)
    seen = model_card(context, units, QUALITY.model_copy(update={"in_groups_of_32": other}), None)
    assert (
        "| this checkpoint on sparse kernels: activations in groups of 32 | 8.2500 | 0.4375 |"
        " 0.0703 |" in seen
    )
    assert "one-shot reference" not in alone
    assert "| one-shot reference (SparseGPT masks + GPTQ) | 8.1250 | 0.5000 | 0.1250 |" in both
    unmeasured = model_card(context, units, None, None)
    assert "Not evaluated by the job that made it." in unmeasured
    assert "perplexity" not in unmeasured


@pytest.mark.parametrize(("family", "has_flags"), [("kimi_k25", True), ("deepseek_v3", False)])
def test_flags_of_a_family_are_for_that_family(
    finished: SmallRun, units: list[UnitManifest], family: str, has_flags: bool
) -> None:
    context = context_with(finished)
    source = context.plan.source.model_copy(update={"family": family})
    text = model_card(
        replace(context, plan=context.plan.model_copy(update={"source": source})), units, None, None
    )
    assert (
        ("--tool-call-parser kimi_k2" in text) == ("--mm-encoder-tp-mode data" in text) == has_flags
    )
    assert "vllm serve <this repository> --tensor-parallel-size 1" in text


def test_vllm_is_told_its_backend_in_either_way_of_its_versions(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    text = model_card(context_with(finished), units, None, None)
    newer, older = re.findall(
        r"```\n((?:VLLM_USE_FLASHINFER_MOE_FP4=1 )?vllm serve .*?)\n```", text, re.DOTALL
    )
    assert (
        newer.split("\\\n  ")[-1] == "--moe-backend flashinfer_trtllm" and "VLLM_USE" not in newer
    )
    assert (
        older.startswith("VLLM_USE_FLASHINFER_MOE_FP4=1 vllm serve")
        and "--moe-backend" not in older
    )
    assert older.count("--") == newer.count("--") - 1
    assert "vLLM 0.32:" in text


def test_source_is_named_with_its_revision(finished: SmallRun, units: list[UnitManifest]) -> None:
    stated = model_card(
        context_with(finished, base_model="owner/name", base_revision="0123abc"), units, None, None
    )
    for words in (
        "[owner/name](https://huggingface.co/owner/name), revision `0123abc`",
        "  checkpoint: hf://owner/name@0123abc\n",
    ):
        assert words in stated
    context = context_with(finished)
    source = context.plan.config.source.model_copy(update={"checkpoint": "hf://owner/other@main"})
    plan = context.plan.model_copy(
        update={"config": context.plan.config.model_copy(update={"source": source})}
    )
    known = model_card(replace(context, plan=plan), units, None, None)
    assert "[owner/other](https://huggingface.co/owner/other), revision `main`" in known
    assert ModelCard(known).data.base_model == "owner/other"
    unknown = model_card(context, units, None, None)
    assert "a checkpoint without a name on the Hub" in unknown and "huggingface.co" not in unknown


def test_experts_sizes_are_those_of_the_files(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    text = model_card(context_with(finished), units, None, None)
    found = re.search(
        r"size of the experts \| ([\d,]+) bytes, ([\d.]+) bits a weight \(source: ([\d,]+),"
        r" ([\d.]+)\)",
        text,
    )
    assert found is not None
    weights = 4 * 16 * 3 * 128 * 256
    after, before = (int(found[i].replace(",", "")) for i in (1, 3))
    for folder, expected in ((finished.checkpoint, after), (finished.source, before)):
        sizes = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as opened:
                sizes |= {
                    n: t.numel() * t.element_size()
                    for n in opened.keys()  # noqa: SIM118 (not a dict)
                    if ".experts." in n
                    for t in [opened.get_tensor(n)]
                }
        assert sum(sizes.values()) == expected
    assert (found[2], found[4]) == (f"{8 * after / weights:.2f}", f"{8 * before / weights:.2f}")


def test_card_names_no_place_of_this_machine(finished: SmallRun, units: list[UnitManifest]) -> None:
    text = model_card(context_with(finished), units, QUALITY, None)
    assert str(finished.root.parent) not in text and str(finished.source) not in text
    assert "calibration.jsonl (1)" in text


def test_no_endpoint_is_in_the_card(finished: SmallRun, units: list[UnitManifest]) -> None:
    context = context_with(finished)
    plan, url = context.plan, "https://store.example:9000"
    c = plan.config
    documents = tuple(d.model_copy(update={"endpoint_url": url}) for d in c.calibration.documents)
    config = c.model_copy(
        update={
            "source": c.source.model_copy(update={"endpoint_url": url}),
            "calibration": c.calibration.model_copy(update={"documents": documents}),
            "run": c.run.model_copy(update={"endpoint_url": url}),
        }
    )
    there = replace(context, plan=plan.model_copy(update={"config": config}))
    text = model_card(there, units, QUALITY, None)
    assert "store.example" not in text and "endpoint" not in text
    assert text == model_card(context, units, QUALITY, None)


def test_licence_and_task_are_those_that_the_configuration_names(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    readme = (
        b"---\nlicense: other\nlicense_name: modified-mit\nlicense_link: LICENSE\npipeline_tag:"
        b" image-text-to-text\n---\n"
    )
    named = context_with(finished, readme, license="apache-2.0", pipeline_tag="text-generation")
    text = model_card(named, units, None, None)
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert not {"license_name", "license_link"} & data.keys()
    assert "Named by whoever made this checkpoint: apache-2.0." in text
    assert "  license: apache-2.0\n  pipeline_tag: text-generation\n" in text


EVIL = "a|b <img src=x> **c** `d` [e](f)"
SHOWN = "a&#124;b &#60;img src=x&#62; &#42;&#42;c&#42;&#42; &#96;d&#96; &#91;e&#93;(f)"


def test_names_of_files_and_devices_stay_text(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    context = context_with(finished, base_model=f"o/{EVIL}", base_revision=EVIL, license=EVIL)
    c = context.plan.config
    documents = tuple(
        d.model_copy(update={"path": f"/data/{EVIL}\n.jsonl"}) for d in c.calibration.documents
    )
    calibration = c.calibration.model_copy(update={"documents": documents})
    config = c.model_copy(update={"calibration": calibration})
    source = replace(context.source, sidecars=(f"LICENSE {EVIL}",))
    there = replace(context, plan=context.plan.model_copy(update={"config": config}), source=source)
    evil_units = [u.model_copy(update={"device": EVIL, "versions": {"x": EVIL}}) for u in units]
    text = model_card(there, evil_units, QUALITY, None)
    body = re.sub(r"(?ms)^---\n.*?^---\n|^(`{3,})yaml\n.*?^\1\n", "", text)
    for shown in (
        f"on {SHOWN}.",
        f"(x {SHOWN})",
        f"{SHOWN} .jsonl (1) |",
        f"revision <code>{SHOWN}</code>",
        f"[o/{SHOWN}](https://huggingface.co/o/a%7Cb%20%3C",
        f"made this checkpoint: {SHOWN}.",
        f"<code>LICENSE {SHOWN}</code>",
    ):
        assert shown in body, shown
    assert "<img" not in body and "**c**" not in body and "](f)" not in body
    rows = [line for line in body.splitlines() if line.startswith("| calibration |")]
    assert len(rows) == 1 and rows[0].count("|") == 3


def test_configuration_in_the_card_is_yaml_whatever_is_in_it(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    context = context_with(finished)
    c = context.plan.config
    name = "a\n```\n<b>\n````.jsonl"
    documents = (c.calibration.documents[0].model_copy(update={"path": f"/data/{name}"}),)
    calibration = c.calibration.model_copy(update={"documents": documents})
    config = c.model_copy(update={"calibration": calibration})
    there = replace(context, plan=context.plan.model_copy(update={"config": config}))
    text = model_card(there, units, None, None)
    found = re.search(r"(?ms)^(`{5,})yaml\n(.*?)^\1$", text)
    assert found is not None, "a fence longer than any inside"
    settings = yaml.safe_load(found[2])
    assert settings["calibration"]["documents"] == [{"path": name, "weight": 1.0}]
    assert settings["compression"] == c.compression.model_dump(mode="json")
    assert "\nname: " in f"\n{found[2]}" and '"compression"' not in found[2]


def test_configuration_in_the_card_says_how_texts_are_read(
    finished: SmallRun, units: list[UnitManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much of a source as decides what becomes of it, and nothing of the machine."""
    read = {
        "columns": {"text": "text"},
        "reasoning": "openthoughts",
        "template_arguments": {"keep": True},
        "max_skipped_share": 0.5,
        "weight": 2.0,
    }
    path = str(TINY / "calibration.jsonl")
    own = {"path": path, "endpoint_url": "http://127.0.0.1:9", **read}
    setting = f"calibration.documents={json.dumps([own])}"
    prepared = prepare(configure(finished.source, f"memory://{tmp_path.name}", setting))
    context = replace(context_with(finished), plan=prepared.plan)
    text = model_card(context, units, None, None)
    found = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    (document,) = yaml.safe_load(found[1])["calibration"]["documents"]
    assert document == {"path": "calibration.jsonl", **read}
    (tmp_path / "config.yaml").write_text(found[1].replace("SOURCE", str(finished.source)))
    shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = prepare(load_config(Path("config.yaml"), (), "memory://again")).plan
    assert plan.documents_digest == prepared.plan.documents_digest
    assert f"`{plan.documents_digest}`" in text


def test_configuration_in_the_card_makes_the_same_plan(
    finished: SmallRun, units: list[UnitManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would do it: the block as a file, the texts beside it, the source by its path."""
    text = model_card(context_with(finished), units, None, None)
    found = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert found is not None and "the path of the source for SOURCE" in text
    (tmp_path / "config.yaml").write_text(found[1].replace("SOURCE", str(finished.source)))
    shutil.copy(TINY / "calibration.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = prepare(load_config(Path("config.yaml"), (), "memory://again")).plan
    assert plan.digest == finished.prepared.plan.digest
    assert f"`{plan.digest}`" in text and f"`{plan.documents_digest}`" in text
