"""p48ray.json: what a finished checkpoint says of itself."""

import hashlib
from typing import Literal

from pydantic import Field

from p48ray.checkpoint.foreign import Folding
from p48ray.run.records import Record, canonical_json

MANIFEST_FILE = "p48ray.json"
"""Of a finished checkpoint, beside its weights."""


class ModelOptForm(Record):
    """What a checkpoint in ModelOpt's layout lacks of its compressed-tensors form, for the way
    back: 1/(1/x) is another float32 for one x in seven."""

    quantization_config: str = Field(description="JSON of that key of config.json, keys in order.")
    global_scales: dict[str, tuple[float, float]] = Field(
        description="weight_global_scale and input_global_scale of every compressed linear."
    )


class ForeignOrigin(Record):
    """Of a checkpoint that others have compressed, and that was converted (finished.foreign)."""

    storage: str = Field(description="How it stored the experts, as layout.FOREIGN_STORAGES.")
    foldings: dict[str, Folding] = Field(
        description=(
            "By module name: of every gate or up whose global scale gave way to the other's, what"
            " became of its block scales. Of all other linears nothing has changed."
        )
    )


class CheckpointManifest(Record):
    """p48ray.json beside the weights: what the checkpoint claims to be, so that it can be verified
    without its run root."""

    schema_version: Literal[1] = 1
    plan_digest: str = Field(description="Empty where no plan of p48ray made it (`foreign`).")
    source_fingerprint: str
    sparsity: str
    scale_span: int
    activation_group: int
    experts_per_unit: int
    max_shard_size: int
    relative_weight_errors: dict[str, float] = Field(
        description="|W - Q|^2 / |W|^2 of every compressed linear, by module name."
    )
    shifts: dict[str, int] = Field(
        default_factory=dict,
        description=(
            "Linear -> e, of those that are 2^e times the source's: an expert's up and down, whose"
            " product is the same (LayerScales.shifts)."
        ),
    )
    unit_sha256: dict[str, str] = Field(
        description=(
            "SHA-256 of every unit's shard, by unit id; its tensors lie here byte for byte, or in"
            " sparse storage and in ModelOpt's layout decode to it."
        )
    )
    untouched_sha256: dict[str, str] = Field(
        description="SHA-256 of every other tensor's bytes, by name."
    )
    header_sha256: dict[str, str] = Field(
        description="SHA-256 of every safetensors file's header, length included, by file."
    )
    file_sha256: dict[str, str] = Field(
        description=(
            "SHA-256 of the files beside them; not of the card, which people edit, nor of this one."
        )
    )
    modelopt: ModelOptForm | None = Field(
        None,
        description="In a checkpoint in ModelOpt's layout; the key is not there in any other.",
        exclude_if=lambda found: found is None,
    )
    foreign: ForeignOrigin | None = Field(
        None,
        description="Where others had compressed it; the key is not there otherwise.",
        exclude_if=lambda found: found is None,
    )
    sha256: str = Field("", description="Of this record's canonical JSON with this field empty.")

    @property
    def origin(self) -> str:
        """What it was made by, or of."""
        return (
            f"plan {self.plan_digest}"
            if self.foreign is None
            else f"converted from {self.source_fingerprint}"
        )

    def sealed(self) -> "CheckpointManifest":
        """The record with its own digest."""
        return self.model_copy(update={"sha256": self.own_sha256()})

    def own_sha256(self) -> str:
        return hashlib.sha256(
            canonical_json(self.model_dump(mode="json") | {"sha256": ""})
        ).hexdigest()
