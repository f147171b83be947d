"""Prepare: open the source, check every input, plan. Nothing is written, so that a mistake leaves nothing behind."""

from dataclasses import dataclass
from pathlib import Path

import torch

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import ModelLayout
from p48ray.config import RunConfig
from p48ray.model.texts import digest_documents, digest_tokenizer
from p48ray.output_layout import OutputShard, plan_output
from p48ray.plan import RunPlan, make_plan
from p48ray.stages.context import StageContext
from p48ray.stages.evaluate import check_length
from p48ray.store.base import Store
from p48ray.store.open import open_store

DRY_RUN_STORE = "memory://dry-run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run whose every input has been checked, before anything is written."""

    plan: RunPlan
    store: Store
    source: CheckpointIndex
    layout: ModelLayout
    shards: tuple[OutputShard, ...]

    @property
    def context(self) -> StageContext:
        return StageContext(plan=self.plan, store=self.store, source=self.source, layout=self.layout, device=torch.device("cpu"))


def prepare(config: RunConfig, is_dry: bool = False) -> Prepared:
    """Open the source, check it, and plan. Nothing is written.

    Args:   is_dry: the texts and the run root may lie where this machine can not reach them; they are not touched.
    Raises: UserError of some kind for whatever the user must mend.
    """
    config = absolute(config)
    source = open_checkpoint(open_store(config.source.checkpoint, config.source.endpoint_url))
    layout = describe_model(source)
    documents = digest_documents(config.calibration.documents, "calibration.documents") if not is_dry else "not read"
    plan = make_plan(config, source, layout, documents, digest_tokenizer(source))
    if config.evaluation is not None:
        check_length(plan, config.evaluation, layout.text_config.get("max_position_embeddings"))
    shards = () if plan.is_pilot else plan_output(plan.units, config.output.max_shard_size, source, layout)
    store = open_store(DRY_RUN_STORE) if is_dry else open_store(config.run.root, config.run.endpoint_url)
    return Prepared(plan=plan, store=store, source=source, layout=layout, shards=shards)


def absolute(config: RunConfig) -> RunConfig:
    """Local paths as every process will see them, whatever its working directory."""

    def full(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().resolve())

    source = config.source.model_copy(update={"checkpoint": full(config.source.checkpoint)})
    return config.model_copy(update={"source": source, "run": config.run.model_copy(update={"root": full(config.run.root)})})
