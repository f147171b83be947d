"""The front matter of the model card: which model it is of, under which licence, for which task.

Through huggingface_hub's ModelCardData, which the Hub validates.
"""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.errors import ObjectMissingError
from p48ray.numerics.solution import PAIRED_48
from p48ray.run.plan import RunPlan
from p48ray.store.open import scheme_of
from p48ray.unit.context import StageContext

LIBRARY = "vllm"
"""The Hub makes a snippet of it. That of transformers would load wrong weights."""

CARRIED_FIELDS = ("license", "license_name", "license_link", "pipeline_tag")


def front_matter(context: StageContext) -> ModelCardData:
    """What stands above the card."""
    is_sparse = context.plan.config.compression.sparsity == PAIRED_48
    sparse = ["paired-4-8-sparse"] if is_sparse else []
    base = base_model(context.plan)
    relation: dict[str, Any] = {"base_model_relation": "quantized" if base else None}
    return ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        tags=["compressed-tensors", "nvfp4", *sparse, "moe"],
        **relation | stated_fields(context),
    )


def base_model(plan: RunPlan) -> str | None:
    """The source's name on the Hub, where it is known."""
    return plan.config.output.base_model or hub_name(plan)[0]


def base_revision(plan: RunPlan) -> str | None:
    """The source's commit or branch on the Hub, where it is known."""
    return plan.config.output.base_revision or hub_name(plan)[1]


def hub_name(plan: RunPlan) -> tuple[str | None, str | None]:
    """owner/name and revision as a hf:// source states them."""
    checkpoint = plan.config.source.checkpoint
    scheme = scheme_of(checkpoint)
    return scheme.served(checkpoint) if scheme.revisions and scheme.served else (None, None)


def stated_fields(context: StageContext) -> dict[str, str]:
    """Licence and task: as the configuration names them, else as the source's own card does."""
    output, found = context.plan.config.output, carried_fields(context.source)
    if output.license:  # what the source says of its own licence is about another one
        found = {k: v for k, v in found.items() if not k.startswith("license")}
        found["license"] = output.license
    if output.pipeline_tag:
        found["pipeline_tag"] = output.pipeline_tag
    return found


def carried_fields(source: CheckpointIndex) -> dict[str, str]:
    """Licence and task as the source's own card states them."""
    try:
        text = source.store.get("README.md").decode("utf-8-sig", "replace")
    except ObjectMissingError:
        return {}
    if not text.startswith("---"):  # no front matter, which the library would remark upon
        return {}
    data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {name: str(data[name]) for name in CARRIED_FIELDS if data.get(name)}
