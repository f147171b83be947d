"""What was asked: one YAML file maps to one tree of frozen models. Unknown keys are refused; errors carry the dotted path.

Order of a value's sources, later ones win: the defaults below, the file, `--set dotted.key=value`, `--run-root`.
"""

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from p48ray.config_benchmarks import BenchmarksConfig
from p48ray.config_section import Section, as_tuple
from p48ray.errors import ConfigError

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(value: object) -> object:
    """'4.5GB', '512 MiB' or a number of bytes -> bytes."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        factor = SIZE_UNITS.get(found[2].upper())
        if factor is not None:
            return int(float(found[1]) * factor)
    if not isinstance(value, int):
        raise ValueError(f"expected a size such as 5GB, 512MiB or a number of bytes (units: {', '.join(filter(None, SIZE_UNITS))})")
    return value


SizeBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Automatic = Literal["auto"]


class SourceConfig(Section):
    """Where the checkpoint to compress comes from."""

    checkpoint: str = Field(min_length=1, description="Folder, s3://bucket/prefix, or hf://owner/name@revision.")
    trust_remote_code: bool = Field(False, description="Allow the tokenizer code shipped with the source to run.")
    endpoint_url: str | None = Field(None, description="Of an S3-compatible store that holds the source; null: as the environment says.")


class DocumentSource(Section):
    """One source of texts in a mix: .jsonl or .parquet with a column text, messages or conversations."""

    path: str = Field(min_length=1, description="File or folder, local or s3://, or hf://datasets/owner/name[@revision][/path].")
    weight: float = Field(1.0, gt=0, description="Share of the sequences, relative to the other weights.")
    endpoint_url: str | None = Field(None, description="Of an S3-compatible store that holds it; null: as the environment says.")


def as_mix(value: object) -> object:
    """A single path means a mix of one."""
    return ({"path": value},) if isinstance(value, str) else as_tuple(value)


Documents = Annotated[tuple[DocumentSource, ...], BeforeValidator(as_mix), Field(min_length=1)]


class CalibrationConfig(Section):
    """The texts whose activations define the curvature, and how they are cut into work."""

    documents: Documents
    num_sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    seed: int = 0
    propagate: Literal["dense", "compressed"] = Field(
        "dense", description="Which layers feed the next: the source's, or those compressed before it, one layer after the other."
    )
    sequences_per_part: int = Field(8, gt=0, description="Sequences of one activations part; fixes the order of every sum.")
    sequences_per_micro_batch: int = Field(4, gt=0, description="Sequences of one attention call.")
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    stored_bits: Literal[16, 8] = Field(16, description="Of activations and gradients in the run root: bf16, or int8 with a scale per 16.")


class CompressionConfig(Section):
    """The numerics. Everything here changes output bytes."""

    solver: Literal["block_descent", "sparsegpt_gptq", "gptq", "round_to_nearest"] = "block_descent"
    sparsity: Literal["paired-4:8", "none"] = "paired-4:8"
    scale_span: Literal[16, 32] = 32
    activation_group: Literal[16, 32] = 16
    output_curvature: bool = Field(True, description="Masks and values under the curvature of the model's own loss (DESIGN 7.3).")
    damp: Automatic | Annotated[float, Field(gt=0)] = Field("auto", description="Fraction of the Hessian's mean diagonal; auto: see docs.")
    output_damp: Automatic | Annotated[float, Field(gt=0)] = "auto"
    router_weight_exponent: float = Field(2.0, ge=0)
    sweeps: int = Field(12, ge=0, description="Of block descent.")
    code_sweeps: int = Field(0, ge=0, description="Of code descent, after quantization.")
    refine_steps: int = Field(300, ge=0, description="Gradient steps on the values of each expert, masks fixed; see numerics.refine.")
    activation_quantization: bool = Field(True, description="Curvature of NVFP4-quantized activations (W4A4) instead of the original ones.")
    max_fallback_share: float = Field(0.01, ge=0, le=1, description="Share of linears that may fall back to rounding before the job fails.")

    @model_validator(mode="before")
    @classmethod
    def defaults_follow_the_solver(cls, values: object) -> object:
        """The one-shot solvers know neither gradients nor refinement, and refinement needs quantized activations: there their defaults are off."""
        if not isinstance(values, dict):
            return values
        off: dict[str, object] = {}
        if values.get("solver", "block_descent") != "block_descent":
            off = {"output_curvature": False, "refine_steps": 0}
        elif values.get("activation_quantization") is False:
            off = {"refine_steps": 0}
        return off | values

    @model_validator(mode="after")
    def solver_fits_sparsity(self) -> "CompressionConfig":
        allowed = {"gptq": {"none"}, "sparsegpt_gptq": {"paired-4:8"}, "block_descent": {"paired-4:8"}}.get(self.solver)
        if self.refine_steps and not self.activation_quantization:
            raise ValueError("refine_steps needs activation_quantization: true")
        if self.refine_steps and self.solver != "block_descent":
            raise ValueError(f"refine_steps needs solver 'block_descent', found {self.solver!r}")
        if self.output_curvature and self.solver != "block_descent":
            raise ValueError(f"output_curvature needs solver 'block_descent', found {self.solver!r}")
        if allowed is not None and self.sparsity not in allowed:
            raise ValueError(f"solver {self.solver!r} needs sparsity {' or '.join(sorted(allowed))!r}, found {self.sparsity!r}")
        return self


class OutputConfig(Section):
    """The form of the finished checkpoint."""

    max_shard_size: SizeBytes = 5 * 10**9
    storage: Literal["dense", "sparse"] = Field("dense", description="For stock loaders, or for the kernels of paired-4:8.")
    base_model: str | None = Field(
        None, description="owner/name of the source on the Hub, for the card; default: what an hf:// source says."
    )
    base_revision: str | None = Field(None, description="Its commit there, for the card; default: what an hf:// source says.")


class EvaluationConfig(Section):
    """Held-out text on which the finished checkpoint is compared with its source."""

    documents: Documents
    num_sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    seed: int = 0
    sequences_per_part: int = Field(8, gt=0)
    activations: Literal["nvfp4", "original"] = Field("nvfp4", description="What the compressed experts see: W4A4 as served, or W4A16.")
    activation_group: Literal[16, 32] | None = Field(None, description="Default: compression.activation_group.")
    baseline: bool = Field(
        False, description="Also run the published one-shot baseline under run.root/baseline and report it beside the result."
    )


class RunSettings(Section):
    """Where and how the work runs. Only the keys that fix the order of sums can change an output byte (see plan.SETTINGS)."""

    root: str = Field(min_length=1)
    endpoint_url: str | None = Field(None, description="Of an S3-compatible store that holds the run root; null: as the environment says.")
    root_is_shared: bool = Field(False, description="Declares that a local run root is the same folder on every node.")
    experts_per_unit: int = Field(8, gt=0)
    num_workers: int = Field(1, gt=0)
    capture_workers: int | None = Field(None, gt=0, description="Default: num_workers.")
    threads_per_worker: int = Field(1, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    gpu_hour_price: float | None = Field(None, gt=0, description="Currency units per GPU-hour, for the estimate.")
    max_attempts: int = Field(3, gt=0)
    prefetch_units: int = Field(1, ge=0, description="Units that a worker reads, or writes, beside the one that it computes.")
    layers: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = None
    keep: Literal["all", "units", "checkpoint"] = "all"
    boundary_every: int = Field(
        1, gt=0, description="Unless all is kept, the way back finds every n-th layer boundary stored, and runs the layers between again."
    )
    node_cache: str | None = Field(
        None,
        description="Folder on a fast disk of every node, for what its workers read in common; null: the system's for temporary files.",
    )
    node_cache_size: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] | None = Field(
        None, description="Of all its files; 0: none are kept; null: half of what the disk has free."
    )


class RunConfig(Section):
    """The whole of one job's configuration."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: SourceConfig
    calibration: CalibrationConfig
    compression: CompressionConfig = CompressionConfig()
    output: OutputConfig = OutputConfig()
    evaluation: EvaluationConfig | None = None
    benchmarks: BenchmarksConfig | None = Field(None, description="For jobs/evaluate.py.")
    run: RunSettings

    @model_validator(mode="after")
    def compression_fits_storage(self) -> "RunConfig":
        """Sparse storage holds 2 of 4 pairs and one scale per 32 inputs, and nothing else (checkpoint.sparse_storage)."""
        if self.output.storage == "sparse":
            for key, expected in (("sparsity", "paired-4:8"), ("scale_span", 32)):
                if (found := getattr(self.compression, key)) != expected:
                    raise ValueError(f"output.storage: 'sparse' needs compression.{key} {expected!r}, found {found!r}")
        return self


# What the configuration can already say but the code can not yet do: dotted key -> (is it asked for, what to use instead).
UNBUILT: dict[str, tuple[Any, str]] = {
    "run.root": (lambda c: not is_stored(c.run.root), "a local folder or s3://bucket/prefix"),
}


def is_stored(uri: str) -> bool:
    """Whether a place can be written to."""
    return "://" not in uri or uri.startswith(("file://", "s3://"))


def baseline_config(config: RunConfig) -> RunConfig:
    """The published one-shot reference on the same source and texts: SparseGPT masks and GPTQ, unweighted tokens, damping 0.1 (DESIGN 7.1)."""
    one_shot = {"solver": "sparsegpt_gptq", "sparsity": "paired-4:8", "router_weight_exponent": 0.0, "damp": 0.1}
    plain = {"output_curvature": False, "output_damp": "auto", "refine_steps": 0, "code_sweeps": 0}
    compression = config.compression.model_copy(update=one_shot | plain)
    evaluation = config.evaluation.model_copy(update={"baseline": False}) if config.evaluation else None
    root = config.run.root.rstrip("/")
    source = config.source
    if source.checkpoint.startswith("hf://"):  # which the run has mirrored by then
        source = source.model_copy(update={"checkpoint": f"{root}/source", "endpoint_url": config.run.endpoint_url})
    run = config.run.model_copy(update={"root": f"{root}/baseline"})
    calibration = config.calibration.model_copy(update={"propagate": "dense"})
    changed = {"source": source, "calibration": calibration, "compression": compression, "evaluation": evaluation, "run": run}
    return config.model_copy(update={"name": f"{config.name}-baseline"} | changed)


def unbuilt_settings(config: RunConfig) -> list[str]:
    """One sentence for each setting whose feature does not exist yet, by its dotted key."""
    found = []
    for key, (is_asked, instead) in UNBUILT.items():
        if is_asked(config):
            found.append(f"{key}: {lookup(config, key)!r} is not built yet; expected {instead}")
    return found


def lookup(config: BaseModel, dotted: str) -> object:
    """The value at a dotted key, as plain data; None inside a section that is absent."""
    value: Any = config.model_dump(mode="json")
    for name in dotted.split("."):
        value = None if value is None else value[name]
    return value


def dotted_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration tree; lists count as one key."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
        section = next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), None)
        keys += dotted_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def load_config(path: str | Path, overrides: tuple[str, ...] = (), run_root: str | None = None) -> RunConfig:
    """Read a configuration file.

    Args:    path: YAML file. overrides: 'dotted.key=value' texts, values in YAML. run_root: replaces run.root.
    Raises:  ConfigError naming the file, each dotted key, what was expected and what was found.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {override!r}: expected dotted.key=value, for instance --set compression.sweeps=2")
        assign(tree, key, parse_value(key, text))
    if run_root is not None:
        assign(tree, "run.root", run_root)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def parse_value(key: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: value {text!r} is not valid YAML: {error}") from None


def assign(tree: dict[str, Any], dotted: str, value: object) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {section!r} holds a value, not a section")
        tree = child
    tree[name] = value


def explain(error: ValidationError) -> list[str]:
    """One line per problem: dotted key, expected, found, and the nearest known key where one was misspelt."""
    lines = []
    for item in error.errors(include_url=False):
        dotted = ".".join(str(part) for part in item["loc"] if part not in ("constrained-float", "literal['auto']", "tuple[int, ...]"))
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(dotted, dotted_keys(), n=1)
            lines.append(f"{dotted}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"{dotted}: required key is missing")
        elif item["type"] == "value_error":
            lines.append(  # a rule over several sections names its keys itself
                (f"{dotted}: " if dotted else "")
                + str(item["ctx"]["error"])
                + ("" if isinstance(item["input"], dict) else f", found {shorten(item['input'])}")
            )
        else:
            lines.append(f"{dotted or 'configuration'}: {item['msg']}, found {shorten(item['input'])}")
    return lines


def shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
