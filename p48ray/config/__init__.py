"""What was asked: one YAML file maps to one tree of frozen models. Unknown keys are refused; errors
carry the dotted path.

Order of a value's sources, later ones win: the defaults below, the file, `--set dotted.key=value`,
`--run-root`.

Belongs here: keys, their types, defaults, units and rules between them. section has the base of all
sections, compression, greedy, output and benchmarks are four of them, documents has a source of
texts, the others stand below; addresses has the types of places and endpoints; yaml_text reads YAML
within bounds, load makes the tree from a file and words its errors. To add a key: a field with a
description, its class in run.plan (does it change bytes?), `python -m p48ray.config_page`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from p48ray.config.addresses import EndpointUrl, Place
from p48ray.config.benchmarks import BenchmarksConfig
from p48ray.config.compression import CompressionConfig
from p48ray.config.documents import Documents
from p48ray.config.greedy import GreedyConfig
from p48ray.config.output import OutputConfig
from p48ray.config.section import MAX_BYTES, Count, Section, as_tuple, parse_size


class SourceConfig(Section):
    """Where the checkpoint to compress comes from."""

    checkpoint: Place = Field(
        min_length=1,
        description=(
            "Folder, s3://bucket/prefix, or hf://owner/name@revision. The files count, not where"
            " they lie."
        ),
    )
    trust_remote_code: bool = Field(
        False, description="Allow the tokenizer code shipped with the source to run."
    )
    endpoint_url: EndpointUrl = Field(
        None,
        description=(
            "URL of the S3-compatible store that holds the source; null: as the environment says."
        ),
    )


class CalibrationConfig(Section):
    """The texts whose activations define the curvature, and how they are cut into work."""

    documents: Documents = Field(
        description=(
            "A path, or a list of sources (entries below). Their bytes and weights change the"
            " checkpoint; where they lie does not."
        )
    )
    num_sequences: int = Field(
        gt=0,
        le=10**6,
        description=(
            "[sequences] How many are cut from the texts. Stored bytes and time grow with it."
        ),
    )
    sequence_length: int = Field(
        gt=1,
        le=2**24,
        description=(
            "[tokens] Length of each sequence; at most the model's max_position_embeddings."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description=(
            "Seed of the draw of sequences, and of the labels whose loss gives the gradients."
        ),
    )
    propagate: Literal["dense", "compressed"] = Field(
        "dense",
        description=(
            "Which layers feed the next: the source's, or those compressed before it, one layer"
            " after the other."
        ),
    )
    sequences_per_part: int = Field(
        8,
        gt=0,
        le=10**6,
        description=(
            "[sequences] Size of a part, which is stored and resumed as a whole. It fixes the order"
            " of every sum."
        ),
    )
    sequences_per_micro_batch: int = Field(
        4,
        gt=0,
        le=10**6,
        description="[sequences] Size of one call of attention. A larger one takes more memory.",
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description=(
            "Number format of the model's layers in capture and gradients. bfloat16 takes half the"
            " memory."
        ),
    )
    stored_bits: Literal[16, 8] = Field(
        16,
        description=(
            "[bits] Form of stored activations and gradients: bf16, or int8 with a scale per 16"
            " values (9/16 of the bytes)."
        ),
    )


class EvaluationConfig(Section):
    """Held-out text on which the finished checkpoint is compared with its source."""

    documents: Documents = Field(description="Held-out texts, as calibration.documents has them.")
    num_sequences: int = Field(
        gt=0,
        le=10**6,
        description=(
            "[sequences] How many are cut from the texts. The time of the stage evaluate grows"
            " with it."
        ),
    )
    sequence_length: int = Field(gt=1, le=2**24, description="[tokens] Length of each sequence.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the draw of sequences.")
    sequences_per_part: int = Field(
        8,
        gt=0,
        le=10**6,
        description="[sequences] Size of a part, the piece of work that a worker takes.",
    )
    activations: Literal["nvfp4", "original"] = Field(
        "nvfp4", description="What the compressed experts see: W4A4 as served, or W4A16."
    )
    activation_group: Literal[16, 32] | None = Field(
        None,
        description=(
            "[inputs] How many share one activation scale; null: as compression.activation_group."
        ),
    )
    baseline: bool = Field(
        False,
        description=(
            "Also run the published one-shot baseline under run.root/baseline and report it beside"
            " the result."
        ),
    )
    greedy: GreedyConfig | None = None

    @model_validator(mode="after")
    def greedy_fits_the_sequences(self) -> "EvaluationConfig":
        """Prompts are the first sequences' beginnings, and drafts their own continuations."""
        if self.greedy is not None:
            self.greedy.check_fits(self.num_sequences, self.sequence_length)
        return self


def as_ray_counts(gpus: float) -> float:
    """Ray shares out one GPU, or whole ones."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("expected a share of one GPU, or a whole number of them")
    return gpus


class RunSettings(Section):
    """Where and how the work runs. Only the keys that fix the order of sums can change an output
    byte (see plan.SETTINGS)."""

    root: Place = Field(
        min_length=1,
        description=(
            "Folder or s3://bucket/prefix that holds all of the run. On a cluster every node has to"
            " reach it."
        ),
    )
    endpoint_url: EndpointUrl = Field(
        None,
        description=(
            "URL of the S3-compatible store that holds the run root; null: as the environment says."
        ),
    )
    root_is_shared: bool = Field(
        False, description="Declares that a local run root is the same folder on every node."
    )
    experts_per_unit: int = Field(
        8,
        gt=0,
        le=10**5,
        description=(
            "[experts] How many are compressed together. Fewer take less GPU memory and more time"
            " an expert."
        ),
    )
    num_workers: Count = Field(
        1,
        description="[workers] How many processes work at the same time, at most.",
    )
    capture_workers: Count | None = Field(
        None,
        description=(
            "[workers] How many may stream the model, num_workers at most; null: all. The nodes"
            " that hold them read the whole source."
        ),
    )
    threads_per_worker: int = Field(
        1,
        gt=0,
        le=1024,
        description=(
            "[threads] CPU threads of a worker, and CPUs asked of Ray. The rounding of matrix"
            " products depends on it."
        ),
    )
    gpus_per_worker: Annotated[float, AfterValidator(as_ray_counts)] = Field(
        0.0,
        ge=0,
        le=64,
        description=(
            "[GPUs] GPUs asked of Ray for a worker; 0: it computes on CPUs. Device models differ in"
            " bytes (DESIGN 5.2)."
        ),
    )
    gpu_hour_price: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description=(
            "[money an hour] Price of a GPU-hour, for the cost in the plan, the report and `p48ray"
            " status`."
        ),
    )
    max_gpu_hours: float | None = Field(
        None,
        gt=0,
        le=10**9,
        description=(
            "[GPU-hours] When workers have had so many, those of finished work of before included,"
            " no task is begun any more; the job ends with 1 once those under way are done."
        ),
    )
    max_attempts: int = Field(
        3,
        gt=0,
        le=1000,
        description=(
            "[attempts] Tries at a task before it is set aside as failed. The loss of a node does"
            " not count."
        ),
    )
    prefetch_units: int = Field(
        1,
        ge=0,
        le=64,
        description=(
            "[units] How many a worker reads for, or writes, beside the one that it computes. They"
            " share its memory."
        ),
    )
    layers: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = Field(
        None,
        description=(
            "Compress only these layers, as a pilot without a checkpoint; null: all layers with"
            " experts."
        ),
    )
    keep: Literal["all", "units", "checkpoint"] = Field(
        "all",
        description=(
            "What stays in the run root. units: no activations, gradients or boundaries;"
            " checkpoint: no unit shards either."
        ),
    )
    boundary_every: Count = Field(
        1,
        description=(
            "[layers] With compression.output_curvature: store every n-th layer boundary. The"
            " backward pass runs n layers again and holds in memory what enters them."
        ),
    )
    layers_in_flight: Count = Field(
        3,
        description=(
            "[layers] The backward pass waits before its next run.boundary_every layers while so"
            " many have units that are not done."
        ),
    )
    scratch: str | None = Field(
        None,
        description=(
            "Folder for activations, gradients and boundaries, whose records stay in run.root: a"
            " node's disk or memory for a job of that node, driver included, or a file system that"
            " all nodes share; null: in run.root."
        ),
    )
    node_cache: str | None = Field(
        None,
        description=(
            "Folder on a fast disk of every node, for what its workers read in common; null: the"
            " system's for temporary files."
        ),
    )
    node_cache_size: (
        Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=MAX_BYTES)] | None
    ) = Field(
        None,
        description=(
            "[bytes, or a text such as 500GB] Limit of run.node_cache; 0: no cache; null: half of"
            " what the disk has free."
        ),
    )

    @property
    def stream_workers(self) -> int:
        """How many workers share the parts among them."""
        return min(self.capture_workers or self.num_workers, self.num_workers)


class RunConfig(Section):
    """The whole of one job's configuration."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, and of the checkpoint in its card.",
    )
    source: SourceConfig
    calibration: CalibrationConfig
    compression: CompressionConfig = CompressionConfig()
    output: OutputConfig = OutputConfig()
    evaluation: EvaluationConfig | None = None
    benchmarks: BenchmarksConfig | None = Field(None, description="For jobs/evaluate.py.")
    run: RunSettings

    @model_validator(mode="after")
    def compression_fits_storage(self) -> "RunConfig":
        """Sparse storage holds 2 of 4 pairs and one scale per 32 inputs, and nothing else
        (checkpoint.sparse_storage)."""
        if self.output.storage == "sparse":
            for key, expected in (("sparsity", "paired-4:8"), ("scale_span", 32)):
                if (found := getattr(self.compression, key)) != expected:
                    raise ValueError(
                        f"output.storage: 'sparse' needs compression.{key} {expected!r}, found"
                        f" {found!r}"
                    )
        return self
