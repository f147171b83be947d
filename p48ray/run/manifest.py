"""What was done: the records that mark finished work. A thing is done when its manifest exists."""

from typing import Literal

from pydantic import Field, NonNegativeInt

from p48ray.run.records import Record
from p48ray.run.run_root import BlobKind
from p48ray.run.scale_counts import GroupHistogram, LayerScaleCounts, ScaleCounts

Phase = Literal[
    "fetch",  # what nothing was computed in, while experts and tokens came
    "curvature",  # H and G of gate-up, then of down
    "solve",  # both solvers' calls
    "ladder",  # the error after each step
    "refine",  # the three linears together
    "describe",  # records, and tensors in the form of the shard
]
"""What a unit's seconds are spent on, in order."""

Outcome = Literal["solved", "one_shot", "round_to_nearest", "zero"]
"""What became of a linear (docs/DESIGN.md, glossary)."""


class StoreFacts(Record):
    """What a bucket was seen to do when the run began (store.probe); every process opens it
    accordingly."""

    schema_version: Literal[1] = 1
    range_copy: bool = Field(description="Byte ranges are copied on the store's side.")
    unequal_parts: bool
    checksums: bool = Field(description="SHA-256 of objects is kept and told.")


class MirrorManifest(Record):
    """One file of the source that lies in the run root, byte for byte as the Hub lists it."""

    schema_version: Literal[1] = 1
    source: str = Field(description="hf:// uri with the commit.")
    path: str
    size_bytes: int
    sha256: str = Field(description="Of the bytes as they were copied.")
    seconds: float
    finished_at: float = Field(description="Unix time, seconds.")


class NotFiniteTensor(Record):
    """A tensor of the source that holds values which are not finite."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: tuple[int, ...] = Field(description="Index of the first such value.")
    num_nan: int
    num_inf: int
    num_minus_inf: int


class ScanManifest(Record):
    """What was found in the tensors of one weight file of the source that are outside the
    compressed experts."""

    schema_version: Literal[1] = 1
    source_fingerprint: str
    file: str
    num_tensors: int
    num_bytes: int = Field(description="That were read.")
    refused: tuple[NotFiniteTensor, ...]
    router_biases: tuple[NotFiniteTensor, ...] = Field(
        description="With -inf alone, which keeps experts from being chosen: said, not refused."
    )
    seconds: float
    finished_at: float = Field(description="Unix time, seconds.")


class SourceTexts(Record):
    """What was read of one source of texts. `skipped`, `cut`: rows by reason; a row may be cut for
    several. `tokens`: packed, before the draw."""

    path: str
    rows: int
    documents: int
    characters: int
    tokens: int
    skipped: dict[str, int]
    cut: dict[str, int]


class TokensManifest(Record):
    """Packed token ids: of the calibration sequences, or of an evaluation's."""

    schema_version: Literal[1] = 1
    owner: str = Field(description="The digest of the plan's units, or the evaluation's.")
    size_bytes: int
    sha256: str
    sources: tuple[SourceTexts, ...] = Field(
        (), description="In the order of the mix. None in run roots of before."
    )
    origins: tuple[NonNegativeInt, ...] = Field(
        (), description="Of every sequence, the place of its source in the mix. None before."
    )


class PartManifest(Record):
    """One blob of a stream: one part at one layer. `kind` says of what."""

    schema_version: Literal[1] = 1
    units_digest: str
    kind: BlobKind
    layer: int
    part: int
    num_tokens: int
    size_bytes: int
    sha256: str
    seconds: float = Field(
        description=(
            "That the stream took for the part at this layer, and since its record before, a share"
            " of what its parts did together included. What the backward pass writes of experts'"
            " inputs has the forward pass's too, up to the boundary that it runs from."
        )
    )
    write_seconds: float = Field(
        description="That a thread beside it took to hash and write the blob."
    )
    finished_at: float = Field(description="Unix time, seconds, when the blob was durable.")
    worker: str = Field("", description="The process; empty in manifests of before.")


class BoundaryPart(PartManifest):
    """A layer boundary: the residual stream that enters a layer, or the gradient with respect to
    it."""

    kind: Literal["residuals", "compressed-residuals", "residual-gradients"]


class ActivationPart(PartManifest):
    """One part of one layer's captured expert inputs."""

    kind: Literal["activations"] = "activations"
    amax_input: float = Field(
        ge=0, description="Largest |x| over the MoE inputs, as stored (bf16)."
    )
    amax_by_expert: tuple[float, ...] = Field(
        description="Largest |h| over each expert's intermediates, original weights."
    )
    input_groups: GroupHistogram = Field(
        description="Of the inputs' groups that share an activation scale."
    )
    intermediate_groups: GroupHistogram = Field(
        description="Of the intermediates', from a sample of each expert's tokens."
    )
    tokens_per_expert: tuple[int, ...]


class GradientPart(PartManifest):
    """One part of the gradients at one layer's routed output."""

    kind: Literal["gradients"] = "gradients"
    draws: int = Field(1, gt=0, description="Of labels, each with a column of gradients.")
    mean_square: float = Field(ge=0, description="Mean over tokens of |delta|^2.")


class LayerScales(Record):
    """The two input global scales of a complete layer (DESIGN 2.2: one scale for all experts of a
    layer, so that units stay independent)."""

    schema_version: Literal[1] = 1
    units_digest: str
    layer: int
    amax_input: float
    amax_intermediate: float = Field(description="After the shifts.")
    shifts: dict[int, int] = Field(
        description="Expert -> k, of those whose up is times 2^-k and whose down times 2^k."
    )
    headroom: tuple[float, float] = Field(
        description="Of gate and up, and of down: how far above the amax values saturate."
    )
    gate_up: float = Field(
        gt=0, description="448 * 6 / (headroom * amax_input); 1 where that is 0."
    )
    down: float = Field(
        gt=0, description="448 * 6 / (headroom * amax_intermediate); 1 where that is 0."
    )
    calibration: tuple[ScaleCounts, ScaleCounts] = Field(
        description="Of the inputs' groups and the intermediates' under these scales, by bins."
    )
    tokens_per_expert: tuple[int, ...]


class LinearRecord(Record):
    """What became of one expert linear."""

    name: str
    tokens: int
    outcome: Outcome
    reason: str
    damp: float = Field(
        description=(
            "Fraction of the Hessian's mean diagonal that was added; 0 where no factor was needed."
        )
    )
    shrinkage: float = Field(
        description="Weight of the layer's statistics in this expert's, 0 to 1."
    )
    relative_weight_error: float = Field(description="|W - Q|^2 / |W|^2.")
    relative_output_error: float = Field(
        description=(
            "Mean |W h - Q h'|^2 / mean |W h|^2 over the calibration tokens (see unit.compress)."
        )
    )


class LadderStep(Record):
    """Error of one expert's linears after one step of its solve (unit.ladder), by "gate_up" and
    "down"."""

    step: str
    output_error: dict[str, float] = Field(
        description="Mean |W h - Q h'|^2 / mean |W h|^2 over the calibration tokens."
    )
    loss_error: dict[str, float] = Field(
        description=(
            "The same in the metric of the model's own loss, which the solver lowers; empty without"
            " gradients."
        )
    )


class UnitManifest(Record):
    """One finished unit. Names the attempt whose shard counts."""

    schema_version: Literal[1] = 1
    units_digest: str
    unit: str
    attempt: str
    size_bytes: int
    sha256: str
    data_offset: int = Field(description="Where the tensors begin in the shard, after its header.")
    input_global_scales: tuple[float, float] = Field(
        description="Of gate and up, and of down: the layer's when the unit was made."
    )
    shifts: dict[int, int] = Field(
        default_factory=dict, description="LayerScales.shifts of its own experts."
    )
    linears: tuple[LinearRecord, ...]
    ladder: tuple[LadderStep, ...] = Field(
        (), description="Of one of the experts, step by step; empty in manifests of before."
    )
    clipped_input_share: float
    clipped_intermediate_share: float
    weight_scales: ScaleCounts = Field(
        ScaleCounts(), description="Of the blocks of weights that share a scale; none saturates."
    )
    seconds: dict[str, float] = Field(description="By Phase; writing the shard is in none.")
    peak_gpu_bytes: dict[str, int] = Field(
        default_factory=dict, description="Largest allocated GPU memory by phase; empty on a CPU."
    )
    finished_at: float = Field(description="Unix time, seconds.")
    worker: str = Field("", description="The process; empty in manifests of before.")
    device: str
    versions: dict[str, str]


class ShardVerdict(Record):
    """What verification found in one output shard."""

    schema_version: Literal[1] = 1
    plan_digest: str
    shard: str
    size_bytes: int
    num_tensors: int
    num_linears: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = Field(
        (), description="Of values that are not finite, and are so in the source."
    )
    unsound_units: tuple[str, ...] = Field(
        (), description="Units that are refused as they were made, not as they were stitched."
    )
    header_sha256: str
    untouched_sha256: dict[str, str] = Field(description="By tensor, as read here.")


class CompressedSums(Record):
    """Sums over some held-out sequences through the compressed model; natural logarithms."""

    loss: float
    correct: int
    kl: float


class TokenSums(Record):
    """Sums over some held-out tokens; natural logarithms."""

    num_tokens: int
    source_loss: float
    source_correct: int
    compressed_loss: float
    compressed_correct: int
    kl: float
    in_groups_of_32: CompressedSums | None = Field(
        None, description="With activation scales of 32 inputs, as kernels of paired-4:8 see them."
    )


class EvaluationCell(TokenSums):
    """Those of one source of the mix in one stretch of positions."""

    document: int = Field(ge=0, description="Place of the source in evaluation.documents.")
    stretch: int = Field(description="By position in the sequence, the first is 0.")


class EvaluationPart(Record):
    """Some held-out sequences, their tokens by cell."""

    schema_version: Literal[1] = 1
    plan_digest: str
    evaluation: str = Field(description="Digest of what the figures depend on.")
    part: int
    stretch_ends: tuple[int, ...] = Field(description="After which position each stretch ends.")
    cells: tuple[EvaluationCell, ...] = Field(description="Those that have tokens.")
    activation_scales: tuple[LayerScaleCounts, ...] = Field(
        (), description="By layer, as served; none where activations are not quantized."
    )


class PublishedShard(Record):
    """One shard whose bytes the Hub has, so that the commit needs no more than this record."""

    schema_version: Literal[1] = 1
    endpoint: str
    repo: str
    revision: str
    path: str
    size_bytes: int
    sha256: str
    checkpoint_sha256: str = Field(
        description=(
            "Of the p48ray.json that names every byte of the shard; under another one the record is"
            " void."
        )
    )
    finished_at: float = Field(description="Unix time, seconds.")


class Failure(Record):
    """One failed attempt at a task."""

    schema_version: Literal[1] = 1
    stage: str
    task: str
    attempt: str
    error: str
    traceback: str
    input: str
    is_transient: bool
