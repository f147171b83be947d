"""What will be done: a pure function of the configuration and the checkpoint's headers. No weight
is read to make a plan.

Two digests. `units_digest` covers everything that can change a byte of a unit's shard, and is what
parts, scales and units carry; `digest` covers the checkpoint's bytes too, and is what verdicts and
p48ray.json carry. `SETTINGS` says of every configuration key which of the two it belongs to. A run
root with units of other settings is refused by the name of the first setting that differs; one that
differs in settings of the checkpoint alone changes hands (check_plan), with all its units.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field, JsonValue

from p48ray import __version__
from p48ray.checkpoint.families import ModelLayout, check_divisibility
from p48ray.checkpoint.fp8 import Fp8Weight, plain_tensors, stored_floats
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.config import RunConfig
from p48ray.config.benchmarks import BenchmarksConfig
from p48ray.config.greedy import GreedyConfig
from p48ray.config.load import dotted_keys, lookup
from p48ray.errors import ConfigError
from p48ray.run.passes import Passes
from p48ray.run.records import Record, canonical_json

FORMAT_VERSION = 5  # layout of the run root and of unit shards
NUMERICS_VERSION = 7  # bumped by whoever changes a number that reaches an output byte

Effect = Literal["units", "checkpoint", "free"]

# What every configuration key may change: a unit's bytes, only how units are put together
# (checkpoint), or neither (free: who works, where, and what is measured afterwards). Where
# compressed layers feed the next, `run.layers` belongs to the units (units_facts).
SETTINGS: dict[str, Effect] = {
    "name": "checkpoint",  # stands in the checkpoint's README
    # the fingerprint counts, not the place; of two hf:// sources the commit too (check_plan)
    "source.checkpoint": "free",
    "source.trust_remote_code": "free",
    "source.endpoint_url": "free",
    "calibration.documents": "free",  # bytes, weights and reading count (documents_digest)
    "calibration.num_sequences": "units",
    "calibration.sequence_length": "units",
    "calibration.seed": "units",
    "calibration.propagate": "units",
    "calibration.sequences_per_part": "units",
    "calibration.sequences_per_micro_batch": "units",
    "calibration.compute_dtype": "units",
    "calibration.stored_bits": "units",
    "compression.solver": "units",
    "compression.sparsity": "units",
    "compression.scale_span": "units",
    "compression.activation_group": "units",
    "compression.activation_headroom": "units",
    "compression.output_curvature": "units",
    "compression.damp": "units",
    "compression.output_damp": "units",
    "compression.router_weight_exponent": "units",
    "compression.sweeps": "units",
    "compression.code_sweeps": "units",
    "compression.refine_steps": "units",
    "compression.activation_quantization": "units",
    "compression.max_fallback_share": "free",
    "output.max_shard_size": "checkpoint",
    "output.storage": "checkpoint",
    "output.base_model": "checkpoint",  # stands in the card
    # so does this, but the source's fingerprint says more, and run roots of before keep their
    # digest
    "output.base_revision": "free",
    "output.license": "free",  # so do these, and no output byte follows from them
    "output.pipeline_tag": "free",
    "evaluation.documents": "free",  # evaluation results lie under a digest of their own
    "evaluation.num_sequences": "free",
    "evaluation.sequence_length": "free",
    "evaluation.seed": "free",
    "evaluation.sequences_per_part": "free",
    "evaluation.activations": "free",
    "evaluation.activation_group": "free",
    "evaluation.baseline": "free",
    **dict.fromkeys(dotted_keys(GreedyConfig, "evaluation.greedy."), "free"),  # likewise
    **dict.fromkeys(
        dotted_keys(BenchmarksConfig, "benchmarks."), "free"
    ),  # measured afterwards; each result is kept under what it was measured with
    "run.root": "free",
    "run.endpoint_url": "free",
    "run.root_is_shared": "free",
    # experts of a unit are solved as one batch, and lie together in the output
    "run.experts_per_unit": "units",
    "run.num_workers": "free",
    "run.capture_workers": "free",
    # a matrix product's rounding depends on how many threads share it
    "run.threads_per_worker": "units",
    # across device models: within tolerance; manifests record the device
    "run.gpus_per_worker": "free",
    "run.gpu_hour_price": "free",
    "run.max_gpu_hours": "free",
    "run.max_attempts": "free",
    "run.prefetch_units": "free",
    "run.layers": "checkpoint",
    "run.keep": "free",
    "run.boundary_every": "free",  # what is run again comes out bit for bit
    "run.scratch": "free",
    "run.layers_in_flight": "free",
    "run.node_cache": "free",
    "run.node_cache_size": "free",
}


class WorkUnit(Record):
    """Some experts of one layer: gate, up and down of each, since down needs the compressed gate
    and up."""

    layer: int
    first_expert: int
    num_experts: int

    @property
    def id(self) -> str:
        last = self.first_expert + self.num_experts - 1
        return f"L{self.layer:03d}-E{self.first_expert:03d}-{last:03d}"

    @staticmethod
    def layer_of(unit_id: str) -> int:
        """The layer that an id names."""
        return int(unit_id.removeprefix("L").partition("-")[0])

    @staticmethod
    def experts_of(unit_id: str) -> range:
        """The experts that an id names."""
        _, first, last = unit_id.split("-")
        return range(int(first.removeprefix("E")), int(last) + 1)

    @property
    def experts(self) -> range:
        return range(self.first_expert, self.first_expert + self.num_experts)


class SequencePart(Record):
    """A fixed slice of the calibration (or held-out) sequences."""

    part: int
    first_sequence: int
    num_sequences: int


class MirroredFile(Record):
    """A file of the source's repository that is copied into the run root, with the digest that the
    Hub lists for it."""

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


class SourceRecord(Record):
    """The source as the plan saw it. `mirror`: what is copied of a hf:// source, from which every
    worker then reads; of others nothing is."""

    fingerprint: str
    family: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    expert_storage: str
    num_fp8_outside_experts: int = Field(
        0,
        description=(
            "Weights that the output holds as BF16, because no client reads two quantizations."
        ),
    )
    mirror: tuple[MirroredFile, ...] = ()
    scanned: tuple[str, ...] = Field(
        (),
        description=(
            "Weight files with floats outside the compressed experts: each is read through before"
            " the first unit. None in plans of before."
        ),
    )


class RunPlan(Record):
    """Everything that will be done. `digest` and `units_digest` are SHA-256 over `digest_facts` and
    `units_facts`. `made_by`: the version of p48ray that planned it.

    `revisions`: the commit of every hf:// place that the user named, as it was found when the run
    was first planned. `config` names those commits.
    """

    schema_version: Literal[1] = 1
    numerics_version: int
    format_version: int
    config: RunConfig
    source: SourceRecord
    documents_digest: str
    tokenizer_digest: str
    parts: tuple[SequencePart, ...]
    units: tuple[WorkUnit, ...]
    revisions: dict[str, str] = Field(default_factory=dict)
    made_by: str = ""
    units_digest: str
    digest: str

    @property
    def layers(self) -> tuple[int, ...]:
        """Mixtures that are compressed: all of them, or those of a pilot (run.layers)."""
        return (
            self.source.moe_layers
            if self.config.run.layers is None
            else tuple(sorted(set(self.config.run.layers)))
        )

    @property
    def is_pilot(self) -> bool:
        """Some layers only: there will be no checkpoint."""
        return self.layers != self.source.moe_layers

    @property
    def uses_gradients(self) -> bool:
        """Solvers weigh errors by the loss's gradients, so there is a backward pass
        (compression.output_curvature)."""
        return self.config.compression.output_curvature

    @property
    def propagates(self) -> bool:
        """Every layer's inputs come from the compressed layers below it (calibration.propagate)."""
        return self.config.calibration.propagate == "compressed"

    @property
    def passes(self) -> Passes:
        """How the streams go, and what they leave."""
        return Passes(
            num_layers=self.source.num_layers,
            layers=self.layers,
            goes_back=self.uses_gradients,
            propagates=self.propagates,
            every=self.config.run.boundary_every,
        )


def make_plan(
    config: RunConfig,
    index: CheckpointIndex,
    layout: ModelLayout,
    documents_digest: str,
    tokenizer_digest: str,
    mirror: tuple[MirroredFile, ...] = (),
    revisions: Mapping[str, str] = MappingProxyType({}),
) -> RunPlan:
    """Plan a run. Checks every shape the work will meet.

    Args:
        config: its hf:// places are at commits.
        index, layout: of the source.
        documents_digest, tokenizer_digest: of what the calibration tokens are made from.
        mirror, revisions: as SourceRecord and RunPlan hold them.
    Raises: SourceError for shapes that do not divide, ConfigError for settings that do not fit the
        checkpoint.
    """
    check_divisibility(
        layout, max(config.compression.scale_span, config.compression.activation_group)
    )
    if config.run.experts_per_unit > layout.num_experts:
        raise ConfigError(
            f"run.experts_per_unit: expected at most the model's {layout.num_experts} experts,"
            f" found {config.run.experts_per_unit}"
        )
    longest = layout.text_config.get("max_position_embeddings")
    if longest is not None and config.calibration.sequence_length > longest:
        raise ConfigError(
            f"calibration.sequence_length: expected at most max_position_embeddings = {longest},"
            f" found {config.calibration.sequence_length}"
        )
    source = SourceRecord(
        fingerprint=index.fingerprint,
        family=layout.family,
        num_layers=layout.num_layers,
        moe_layers=layout.moe_layers,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        hidden_size=layout.hidden_size,
        moe_intermediate_size=layout.moe_intermediate_size,
        expert_storage=layout.expert_storage,
        num_fp8_outside_experts=sum(
            isinstance(tensor, Fp8Weight) for tensor in plain_tensors(index, layout)
        ),
        mirror=mirror,
        scanned=tuple(dict.fromkeys(entry.file for entry in stored_floats(index, layout))),
    )
    plan = RunPlan(
        numerics_version=NUMERICS_VERSION,
        format_version=FORMAT_VERSION,
        config=config,
        source=source,
        documents_digest=documents_digest,
        tokenizer_digest=tokenizer_digest,
        parts=cut_parts(config.calibration.num_sequences, config.calibration.sequences_per_part),
        units=plan_units(layout, config.run.experts_per_unit, config.run.layers),
        revisions=dict(revisions),
        made_by=__version__,
        units_digest="",
        digest="",
    )
    return plan.model_copy(
        update={
            "units_digest": fact_digest(units_facts(plan)),
            "digest": fact_digest(digest_facts(plan)),
        }
    )


def plan_units(
    layout: ModelLayout, experts_per_unit: int, layers: tuple[int, ...] | None = None
) -> tuple[WorkUnit, ...]:
    """Every expert of every layer that is compressed, in units of consecutive experts.

    Raises: ConfigError when run.layers names a layer that holds no experts.
    """
    wanted = layout.moe_layers if layers is None else tuple(sorted(set(layers)))
    strange = [n for n in wanted if n not in layout.moe_layers]
    if strange or not wanted:
        raise ConfigError(
            f"run.layers: expected some of the layers with experts ({layout.moe_layers[0]} to"
            f" {layout.moe_layers[-1]}), found {strange or 'none'}"
        )
    slices = ranges(layout.num_experts, experts_per_unit)
    return tuple(
        WorkUnit(layer=n, first_expert=first, num_experts=count)
        for n in wanted
        for first, count in slices
    )


def ranges(total: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive slices of at most `size`."""
    return [(first, min(size, total - first)) for first in range(0, total, size)]


def cut_parts(num_sequences: int, per_part: int) -> tuple[SequencePart, ...]:
    slices = enumerate(ranges(num_sequences, per_part))
    return tuple(
        SequencePart(part=i, first_sequence=first, num_sequences=count)
        for i, (first, count) in slices
    )


def fact_digest(facts: Mapping[str, JsonValue]) -> str:
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def units_facts(plan: RunPlan) -> dict[str, JsonValue]:
    """Every fact that can change a byte of a unit, by name."""
    keys = [key for key, effect in SETTINGS.items() if effect == "units"]
    if plan.propagates:
        keys.append("run.layers")  # the layers below are compressed, or they are the source's
    facts: dict[str, JsonValue] = {key: lookup(plan.config, key) for key in keys}  # type: ignore[misc]
    return facts | {
        "numerics version": plan.numerics_version,
        "format version": plan.format_version,
        "source fingerprint": plan.source.fingerprint,
        "calibration documents' digest": plan.documents_digest,
        "tokenizer's digest": plan.tokenizer_digest,
    }


def digest_facts(plan: RunPlan) -> dict[str, JsonValue]:
    """Every fact that can change a byte of the output, by name."""
    keys = [key for key, effect in SETTINGS.items() if effect == "checkpoint"]
    facts: dict[str, JsonValue] = {key: lookup(plan.config, key) for key in keys}  # type: ignore[misc]
    return facts | units_facts(plan)
