"""The model card of a finished checkpoint, generated from the run: only what was done and measured, and how to do it again.

Front matter through huggingface_hub's ModelCardData, which the Hub validates. Nothing in it depends on the clock or the machine, so that a checkpoint is
the same however often it was interrupted.
"""

import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from p48ray import __version__
from p48ray.checkpoint.families import FAMILIES
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.errors import ObjectMissingError
from p48ray.manifest import UnitManifest
from p48ray.numerics.solvers import PAIRED_48
from p48ray.output_layout import unit_bytes
from p48ray.plan import NUMERICS_VERSION, RunPlan
from p48ray.stages.context import StageContext
from p48ray.stages.evaluate import EvaluationResult

VLLM_VERSION = "0.32"  # whose environment variable this is; the flags of a family's models are in its file
CARRIED_FIELDS = ("license", "license_name", "license_link")


def model_card(
    context: StageContext, units: Sequence[UnitManifest], quality: EvaluationResult | None, baseline: EvaluationResult | None
) -> str:
    """README.md of the checkpoint."""
    plan = context.plan
    sections = [
        f"# {plan.config.name}",
        summary(context),
        "## Compression",
        table(("", ""), compression_rows(context)),
        "Per routed expert linear (`gate_proj`, `up_proj`, `down_proj`; the first two share both global scales):",
        table(("key", "dtype", "shape", "meaning"), KEY_ROWS),
        "## Serving",
        serving(plan),
        "## In transformers",
        TRANSFORMERS,
        "## Evaluation",
        evaluation(plan, quality, baseline),
        "## Reproduction",
        reproduction(plan, units),
        "## Integrity",
        "`p48ray verify <this folder>` checks every byte but this card against the digests in `p48ray.json`: SHA-256 of every unit of compressed "
        "experts, of every untouched tensor, of every header and of the files beside them.",
        "## Licence",
        licence(context.source),
    ]
    return f"---\n{front_matter(context).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(context: StageContext) -> ModelCardData:
    is_sparse = context.plan.config.compression.sparsity == PAIRED_48
    base = base_model(context.plan)
    fields: dict[str, Any] = {"base_model_relation": "quantized" if base else None} | carried_fields(context.source)
    return ModelCardData(
        library_name="transformers",
        base_model=base,
        tags=["compressed-tensors", "nvfp4", *(["paired-4-8-sparse"] if is_sparse else []), "moe"],
        **fields,
    )


def base_model(plan: RunPlan) -> str | None:
    """The source's name on the Hub, where it is known."""
    checkpoint = plan.config.source.checkpoint
    named = checkpoint.removeprefix("hf://").partition("@")[0] if checkpoint.startswith("hf://") else None
    return plan.config.output.base_model or named


def carried_fields(source: CheckpointIndex) -> dict[str, str]:
    """The licence as the source's own card states it."""
    try:
        data = ModelCard(source.store.get("README.md").decode("utf-8", "replace"), ignore_metadata_errors=True).data.to_dict()
    except ObjectMissingError:
        return {}
    return {name: str(data[name]) for name in CARRIED_FIELDS if data.get(name)}


def summary(context: StageContext) -> str:
    plan, c = context.plan, context.plan.config.compression
    form = "paired-4:8 sparse and NVFP4 quantized" if c.sparsity == PAIRED_48 else "NVFP4 quantized"
    base = base_model(plan)
    origin = f"`{base}`" if base else "Its source checkpoint"
    vision = " Calibrated on text only; the vision tower and its projector pass through untouched." if has_vision(context) else ""
    return (
        f"{origin} with its routed experts ({len(plan.layers)} layers x {plan.source.num_experts} experts) {form}, weights and activations (W4A4), in the "
        f"compressed-tensors format `nvfp4-pack-quantized`. {everything_else(context)}{vision}"
    )


def everything_else(context: StageContext) -> str:
    """What became of the tensors that no unit made."""
    count = context.plan.source.num_fp8_outside_experts
    fp8 = f", but for {count:,} weights that the source stores in FP8: they are BF16 here, because no client reads two quantizations in one model"
    behind = context.layout.passthrough_expert_layers
    layers = f" Layer {', '.join(map(str, behind))} behind the last one (multi-token prediction) passes through under the same rule."
    return "Everything else is byte for byte as in the source" + (fp8 if count else "") + "." + (layers if behind else "")


def has_vision(context: StageContext) -> bool:
    prefixes = FAMILIES[context.layout.family].vision_prefixes
    return bool(prefixes) and any(name.startswith(prefixes) for name in context.source.tensors)


def compression_rows(context: StageContext) -> list[tuple[str, str]]:
    plan, c = context.plan, context.plan.config.compression
    texts = plan.config.calibration
    documents = ", ".join(f"{d.path.rsplit('/', 1)[-1] if '://' not in d.path else d.path} ({d.weight:g})" for d in texts.documents)
    experts = sum(unit_bytes(context.layout, u) for u in plan.units)
    method = f"`{c.solver}`" + (f", {c.sweeps} sweeps" if c.solver == "block_descent" else "")
    method += ", under the curvature of the model's own loss on the output side" if c.output_curvature else ""
    method += f", then {c.refine_steps} steps of refinement with masks fixed" if c.refine_steps else ""
    return [
        ("routed experts", f"{c.sparsity}, NVFP4 weights (E2M1 codes, one E4M3 scale per 16 inputs), {experts:,} bytes"),
        ("scale span", f"{c.scale_span} inputs" + (" (lossless in the sparse kernels' group-32 form)" if c.scale_span == 32 else "")),
        ("activations", "NVFP4, local scales at run time, one global scale a layer and side"),
        ("everything else", f"untouched; {fp8:,} FP8 weights as BF16" if (fp8 := plan.source.num_fp8_outside_experts) else "untouched"),
        ("method", method),
        ("calibration", f"{texts.num_sequences:,} x {texts.sequence_length:,} tokens, seed {texts.seed}: {documents}"),
    ]


KEY_ROWS = [
    ("`weight_packed`", "U8", "[out, in/2]", "two E2M1 codes a byte, low nibble is the lower input; a dropped pair is a zero byte"),
    ("`weight_scale`", "F8_E4M3", "[out, in/16]", "one scale per 16 inputs"),
    ("`weight_global_scale`", "F32", "[1]", "divisor: w = e2m1 * e4m3 / global"),
    ("`input_global_scale`", "F32", "[1]", "the layer's, of the linear's inputs"),
]


def serving(plan: RunPlan) -> str:
    flags = ["--tensor-parallel-size 4", *FAMILIES[plan.source.family].serving_flags]
    command = " \\\n  ".join([f"vllm serve <this repository> {flags[0]}", *flags[1:]])
    return (
        f"For vLLM {VLLM_VERSION} on NVIDIA Blackwell (a model of Kimi-K2.5's size: 4x B200). Versions that read it want "
        f"`VLLM_USE_FLASHINFER_MOE_FP4=1` in the environment; those that do not take `--moe-backend`.\n\n```\nVLLM_USE_FLASHINFER_MOE_FP4=1 {command}\n```\n\n"
        "These commands were not run on such hardware by the job that made this checkpoint."
    )


TRANSFORMERS = """transformers 5.23 drops the global scales of per-expert NVFP4 weights; this loads them correctly, and does nothing once transformers does:

```python
from p48ray.integrations.transformers import load_model

model = load_model("<this repository>")
```"""


def evaluation(plan: RunPlan, quality: EvaluationResult | None, baseline: EvaluationResult | None) -> str:
    settings = plan.config.evaluation
    if quality is None or settings is None:
        return "Not evaluated by the job that made it."
    rows = [("source", f"{quality.source_perplexity:.4f}", f"{quality.source_accuracy:.4f}", "0")]
    results = (("one-shot reference (SparseGPT masks + GPTQ)", baseline), ("this checkpoint", quality))
    for name, r in results:
        if r is not None:
            rows.append((name, f"{r.compressed_perplexity:.4f}", f"{r.compressed_accuracy:.4f}", f"{r.kl:.4f}"))
    how = "NVFP4 activations emulated" if settings.activations == "nvfp4" else "original activations"
    return table(("", "perplexity", "token accuracy", "KL to source, nats a token"), rows) + (
        f"\n\n{quality.num_tokens:,} held-out tokens in sequences of {settings.sequence_length:,}, {how}, by p48ray's own "
        "evaluation; no other benchmark was run."
    )


def reproduction(plan: RunPlan, units: Sequence[UnitManifest]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(units[0].versions.items()))
    chosen = plan.config.model_dump(mode="json", include={"calibration", "compression", "output"}, exclude={"calibration": {"documents"}})
    settings = json.dumps(chosen, indent=1)
    return (
        f"`python jobs/compress.py --config FILE` of p48ray {__version__} (numerics version {NUMERICS_VERSION}; {versions}); "
        f"plan `{plan.digest}`, source fingerprint `{plan.source.fingerprint}`. Its settings:\n\n```json\n{settings}\n```"
    )


def licence(source: CheckpointIndex) -> str:
    found = carried_fields(source)
    notices = [name for name in source.sidecars if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]
    stated = f"The base model's own: {found.get('license_name') or found['license']}." if found.get("license") else "The base model's own."
    return stated + (f" Its text is in {', '.join(f'`{name}`' for name in notices)}." if notices else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
