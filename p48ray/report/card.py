"""The model card of a finished checkpoint, generated from the run: only what was done and measured,
and how to do it again.

Its front matter is in front_matter.py. Nothing in it depends on the clock or the machine, so that a
checkpoint is the same however often it was interrupted.
"""

from collections.abc import Sequence
from urllib.parse import quote

import yaml

from p48ray import __version__
from p48ray.checkpoint.families import FAMILIES
from p48ray.numerics.solution import PAIRED_48
from p48ray.numerics.solvers import SOLVERS
from p48ray.report.benchmark_section import cells
from p48ray.report.domain_section import domain_tables
from p48ray.report.front_matter import base_model, base_revision, front_matter, stated_fields
from p48ray.report.markdown import code, fenced, plain, table_of
from p48ray.report.serving_card import TRANSFORMERS, serving
from p48ray.report.size_card import expert_bytes, gains_section, size_rows
from p48ray.report.storage_card import convert_card
from p48ray.run.benchmark_results import BenchmarkTable, table_notes
from p48ray.run.manifest import UnitManifest
from p48ray.run.plan import NUMERICS_VERSION, RunPlan
from p48ray.stages.evaluate import EvaluationResult
from p48ray.store.hub.place import HubPlace
from p48ray.store.open import scheme_of
from p48ray.unit.context import StageContext

NOTICES = ("LICENSE", "LICENCE", "NOTICE", "THIRD_PARTY", "USE_POLICY")


def model_card(
    context: StageContext,
    units: Sequence[UnitManifest],
    quality: EvaluationResult | None,
    baseline: EvaluationResult | None,
    benchmarks: BenchmarkTable | None = None,
) -> str:
    """README.md of the checkpoint. With sparse storage it is the dense one's with the note that a
    conversion puts in.

    Args:
        context: of the run.
        units: manifests of all the run's units.
        quality: of this checkpoint on held-out text; None where nothing was evaluated.
        baseline: of the one-shot reference; None where there is none.
        benchmarks: the table; None where none was made.
    """
    plan = context.plan
    sections = [
        f"# {plan.config.name}",
        summary(context),
        "## What is gained",
        gains_section(context),
        "## Compression",
        table_of(
            ("", ""), [*origin_rows(context), *compression_rows(context), *size_rows(context)]
        ),
        (
            "Per routed expert linear (`gate_proj`, `up_proj`, `down_proj`; the first two share"
            " both global scales):"
        ),
        table_of(("key", "dtype", "shape", "meaning"), KEY_ROWS),
        "## Serving",
        serving(context),
        "## In transformers",
        TRANSFORMERS,
        "## Evaluation",
        evaluation(plan, quality, baseline, benchmarks),
        *benchmark_parts(benchmarks),
        "## Reproduction",
        reproduction(context, units),
        "## Integrity",
        (
            "`p48ray verify <this folder>` checks every byte but this card against the digests in"
            " `p48ray.json`: SHA-256 of every unit of compressed experts, of every untouched"
            " tensor, of every header and of the files beside them."
        ),
        "## Licence",
        licence(context),
    ]
    card = f"---\n{front_matter(context).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    if plan.config.output.storage == "sparse":
        card = convert_card(
            card, "sparse", (expert_bytes(context, "dense"), expert_bytes(context, "sparse"))
        )
    return card


def summary(context: StageContext) -> str:
    plan, c = context.plan, context.plan.config.compression
    form = "paired-4:8 sparse and NVFP4 quantized" if c.sparsity == PAIRED_48 else "NVFP4 quantized"
    base = base_model(plan)
    origin = code(base) if base else "Its source checkpoint"
    vision = (
        " Calibrated on text only; the vision tower and its projector pass through untouched."
        if has_vision(context)
        else ""
    )
    return (
        f"{origin} with its routed experts ({len(plan.layers)} layers x {plan.source.num_experts}"
        f" experts) {form}, weights and activations (W4A4), in the compressed-tensors format"
        f" `nvfp4-pack-quantized`. {everything_else(context)}{vision}"
    )


def everything_else(context: StageContext) -> str:
    """What became of the tensors that no unit made."""
    count = context.plan.source.num_fp8_outside_experts
    fp8 = (
        f", but for {count:,} weights that the source stores in FP8: they are BF16 here, because no"
        " client reads two quantizations in one model"
    )
    behind = context.layout.passthrough_expert_layers
    layers = (
        f" Layer {', '.join(map(str, behind))} behind the last one (multi-token prediction) passes"
        " through under the same rule."
    )
    return (
        "Everything else is byte for byte as in the source"
        + (fp8 if count else "")
        + "."
        + (layers if behind else "")
    )


def has_vision(context: StageContext) -> bool:
    prefixes = FAMILIES[context.layout.family].vision_prefixes
    names = (name.removeprefix("model.") for name in context.source.tensors)  # as transformers 5
    return bool(prefixes) and any(name.startswith(prefixes) for name in names)


def hub_link(name: str) -> str:
    return f"[{plain(name)}](https://huggingface.co/{quote(name)})"


def origin_rows(context: StageContext) -> list[tuple[str, str]]:
    """From what it was made."""
    base, revision = base_model(context.plan), base_revision(context.plan)
    named = hub_link(base) if base else "a checkpoint without a name on the Hub"
    at = f", revision {code(revision)}" if revision else ""
    stored = {
        "int4": "INT4 (compressed-tensors `pack-quantized`)",
        "fp8": "FP8 (blocks of 128 x 128)",
        "bf16": "plain floats",
    }.get(context.layout.expert_storage)
    return [
        ("source", f"{named}{at}; fingerprint `{context.plan.source.fingerprint}`"),
        ("its experts", stored or context.layout.expert_storage),
    ]


def compression_rows(context: StageContext) -> list[tuple[str, str]]:
    plan, c = context.plan, context.plan.config.compression
    texts = plan.config.calibration
    documents = ", ".join(f"{plain(place_name(d.path))} ({d.weight:g})" for d in texts.documents)
    method = f"`{c.solver}`" + (f", {c.sweeps} sweeps" if SOLVERS[c.solver].descends else "")
    method += (
        ", under the curvature of the model's own loss on the output side"
        if c.output_curvature
        else ""
    )
    method += (
        f", then {c.refine_steps} steps of refinement with masks fixed" if c.refine_steps else ""
    )
    return [
        (
            "routed experts",
            f"{c.sparsity}, NVFP4 weights (E2M1 codes, one E4M3 scale per 16 inputs)",
        ),
        (
            "scale span",
            f"{c.scale_span} inputs"
            + (" (lossless in the sparse kernels' group-32 form)" if c.scale_span == 32 else ""),
        ),
        ("activations", "NVFP4, local scales at run time, one global scale a layer and side"),
        (
            "everything else",
            (
                f"untouched; {fp8:,} FP8 weights as BF16"
                if (fp8 := plan.source.num_fp8_outside_experts)
                else "untouched"
            ),
        ),
        ("method", method),
        (
            "calibration",
            (
                f"{texts.num_sequences:,} x {texts.sequence_length:,} tokens, seed {texts.seed}:"
                f" {documents}"
            ),
        ),
    ]


KEY_ROWS = [
    (
        "`weight_packed`",
        "U8",
        "[out, in/2]",
        "two E2M1 codes a byte, low nibble is the lower input; a dropped pair is a zero byte",
    ),
    ("`weight_scale`", "F8_E4M3", "[out, in/16]", "one scale per 16 inputs"),
    ("`weight_global_scale`", "F32", "[1]", "divisor: w = e2m1 * e4m3 / global"),
    ("`input_global_scale`", "F32", "[1]", "the layer's, of the linear's inputs"),
]


def evaluation(
    plan: RunPlan,
    quality: EvaluationResult | None,
    baseline: EvaluationResult | None,
    benchmarks: BenchmarkTable | None,
) -> str:
    """The section about held-out text.

    Args:
        plan: of the run.
        quality, baseline, benchmarks: as model_card takes them.
    """
    settings = plan.config.evaluation
    if quality is None or settings is None:
        own = "on held-out text " if is_measured(benchmarks) else ""
        return f"Not evaluated {own}by the job that made it."
    rows = [("source", f"{quality.source_perplexity:.4f}", f"{quality.source_accuracy:.4f}", "0")]
    results = (
        ("one-shot reference (SparseGPT masks + GPTQ)", baseline),
        ("this checkpoint", quality),
    )
    for name, r in results:
        if r is not None:
            rows.append(
                (
                    name,
                    f"{r.compressed_perplexity:.4f}",
                    f"{r.compressed_accuracy:.4f}",
                    f"{r.kl:.4f}",
                )
            )
    if (other := quality.in_groups_of_32) is not None:
        rows.append(
            (
                "this checkpoint on sparse kernels: activations in groups of 32",
                f"{other.perplexity:.4f}",
                f"{other.accuracy:.4f}",
                f"{other.kl:.4f}",
            )
        )
    how = (
        "NVFP4 activations emulated" if settings.activations == "nvfp4" else "original activations"
    )
    whole = (
        table_of(("", "perplexity", "token accuracy", "KL to source, nats a token"), rows)
        + f"\n\n{quality.num_tokens:,} held-out tokens in sequences of"
        f" {settings.sequence_length:,}, {how}, by p48ray's own"
        f" evaluation{'' if is_measured(benchmarks) else '; no other benchmark was run'}."
    )
    return "\n\n".join([whole, *domain_tables(quality, baseline)])


def is_measured(benchmarks: BenchmarkTable | None) -> bool:
    """Whether there is any figure of this checkpoint; what others published of the base alone is no
    news here."""
    ours = benchmarks.column("ours") if benchmarks else None
    return ours is not None and bool(ours.values)


def benchmark_parts(benchmarks: BenchmarkTable | None) -> list[str]:
    """The table of benchmarks and what it was measured with; nothing where none was run."""
    if benchmarks is None or not is_measured(benchmarks):
        return []
    (_, *head), rows = cells(benchmarks, with_errors=False)
    shown = table_of(
        ("per cent", *map(plain, head)), [[plain(cell) for cell in row] for row in rows]
    )
    return ["### Benchmarks", shown, plain(" ".join(table_notes(benchmarks)))]


def reproduction(context: StageContext, units: Sequence[UnitManifest]) -> str:
    """A configuration that makes the same plan of the same source and texts, and the command that
    takes it."""
    plan = context.plan
    versions = ", ".join(
        f"{plain(name)} {plain(version)}" for name, version in sorted(units[0].versions.items())
    )
    devices = ", ".join(plain(device) for device in sorted({u.device for u in units}))
    beside = "" if base_model(plan) else " and the path of the source for SOURCE"
    settings = yaml.safe_dump(own_settings(plan), sort_keys=False, allow_unicode=True)
    return (
        f"p48ray {__version__}, numerics version {NUMERICS_VERSION} ({versions}), on {devices}. As"
        f" `config.yaml`, with the calibration texts beside it{beside}:\n\n"
        + fenced(settings, "yaml")
        + "\n\n"
        + fenced("python jobs/compress.py --config config.yaml --run-root ROOT")
        + f"\n\nThe plan's digest is then `{plan.digest}`. The texts, with their weights, have the"
        f" digest `{plan.documents_digest}`."
    )


def own_settings(plan: RunPlan) -> dict[str, object]:
    """What of the configuration decides about the plan, without this machine's places and
    endpoints."""
    config = plan.config
    sections = {"name", "calibration", "compression", "output"}
    chosen = config.model_dump(mode="json", include=sections)
    chosen["calibration"]["documents"] = [
        {"path": place_name(d.path), "weight": d.weight}
        | d.model_dump(
            mode="json", exclude={"path", "weight", "endpoint_url"}, exclude_defaults=True
        )
        for d in config.calibration.documents
    ]
    chosen["output"] = {k: v for k, v in chosen["output"].items() if v is not None}
    base, revision = base_model(plan), base_revision(plan)
    source = HubPlace("model", base, revision, "").uri if base else "SOURCE"
    return {
        "name": chosen.pop("name"),
        "source": {"checkpoint": source}
        | ({"trust_remote_code": True} if config.source.trust_remote_code else {}),
        **chosen,
        "run": {"experts_per_unit": config.run.experts_per_unit},
    }


def place_name(path: str) -> str:
    """A text's place without the folders of the machine that it lay on."""
    return path.rsplit("/", 1)[-1] if scheme_of(path).is_path else path


def licence(context: StageContext) -> str:
    """What the configuration names, or the source's card and files state; and whose work the
    weights are."""
    source, base = context.source, base_model(context.plan)
    found = stated_fields(context)
    named = found.get("license_name") or found.get("license")
    notices = [name for name in source.sidecars if name.upper().startswith(NOTICES)]
    if context.plan.config.output.license:
        stated = f"Named by whoever made this checkpoint: {plain(str(named))}."
    else:
        stated = f"The base model's own: {plain(named)}." if named else "The base model's own."
    texts = f" Its text is in {', '.join(map(code, notices))}." if notices else ""
    credit = (
        f" The weights are derived from {hub_link(base)}, whose authors took no part in this."
        if base
        else ""
    )
    return stated + texts + credit
