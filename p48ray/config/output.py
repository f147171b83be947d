"""The section `output`: the form of the finished checkpoint."""

from typing import Literal

from pydantic import Field

from p48ray.config.section import Section, SizeBytes


class OutputConfig(Section):
    """The form of the finished checkpoint."""

    max_shard_size: SizeBytes = Field(
        5 * 10**9,
        description=(
            "[bytes, or a text such as 5GB] Largest file of weights; with sparse storage files are"
            " 0.6 of that."
        ),
    )
    storage: Literal["dense", "sparse"] = Field(
        "dense",
        description=(
            "dense: for stock loaders; sparse: for the paired48 patch of vLLM alone, on the GPUs"
            " that docs/serving-and-evaluating.md names."
        ),
    )
    base_model: str | None = Field(
        None,
        description=(
            "owner/name of the source on the Hub, for the card; default: what an hf:// source says."
        ),
    )
    base_revision: str | None = Field(
        None, description="Its commit there, for the card; default: what an hf:// source says."
    )
    license: str | None = Field(
        None,
        min_length=1,
        description=(
            "Licence of the checkpoint, for the card, by the Hub's id (mit); default: what the"
            " source's card says."
        ),
    )
    pipeline_tag: str | None = Field(
        None,
        min_length=1,
        description=(
            "Task of the model, for the card, by the Hub's id (text-generation); default: what the"
            " source's card says."
        ),
    )
