"""The section `benchmarks`: which checkpoints are compared on which of lm-evaluation-harness's
tasks, and who serves them."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from p48ray.config.addresses import OptionalPlace
from p48ray.config.section import Section, as_tuple

Role = Literal["base", "baseline", "ours"]
ROLES: tuple[Role, ...] = ("base", "baseline", "ours")


class BenchmarkTask(Section):
    """One row of the table: a task or group of the harness, and the figure of it that counts."""

    task: str = Field(min_length=1, description="The harness's name.")
    title: str | None = Field(None, description="Name in the table; null: the harness's.")
    shots: int = Field(
        ge=0,
        le=10**4,
        description="[examples] How many are shown in the prompt before the question.",
    )
    metric: str = Field(min_length=1, description="The harness's name of the figure that counts.")
    filter: str = Field(
        "none", description="The harness's filter of the answers, by its name in the task's file."
    )

    hub_dataset: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description=(
            "owner/name of the benchmark on the Hub that this is, for the evaluation results that"
            " are published beside the card; null: it is none of the Hub's."
        ),
    )
    hub_task: str | None = Field(
        None, min_length=1, description="Id of the task in that benchmark's eval.yaml."
    )

    @property
    def label(self) -> str:
        return self.title or self.task

    @model_validator(mode="after")
    def is_named_wholly_or_not(self) -> Self:
        if (self.hub_dataset is None) != (self.hub_task is None):
            raise ValueError("expected hub_dataset and hub_task or neither, found one")
        return self


SHOWN_KEYS = {"title", "hub_dataset", "hub_task"}
"""Of a task: how its figure is shown. The others say what is measured, and a result's digest is of
them alone."""

LEADERBOARD = (
    BenchmarkTask(task="arc_challenge", title="ARC-Challenge", shots=25, metric="acc_norm"),
    BenchmarkTask(task="hellaswag", title="HellaSwag", shots=10, metric="acc_norm"),
    BenchmarkTask(task="mmlu", title="MMLU", shots=5, metric="acc"),
    BenchmarkTask(task="truthfulqa_mc2", title="TruthfulQA mc2", shots=0, metric="acc"),
    BenchmarkTask(task="winogrande", title="Winogrande", shots=5, metric="acc"),
    BenchmarkTask(
        task="gsm8k",
        title="GSM8K",
        shots=5,
        metric="exact_match",
        filter="strict-match",
        hub_dataset="openai/gsm8k",
        hub_task="gsm8k",
    ),
)
"""The Open LLM Leaderboard's first version. Its GSM8K took the number behind `####` and nothing
else, which is the harness's filter strict-match. Of these tasks only GSM8K is known to be a
benchmark of the Hub."""


class ComparedCheckpoint(Section):
    """One column of the table: a checkpoint to be served, or figures that somebody else has
    published of it."""

    title: str | None = Field(None, description="Name in the table; null: what it is.")
    checkpoint: OptionalPlace = Field(
        None,
        description=(
            "Folder, or hf://owner/name@revision; of `ours` null means run.root/checkpoint."
        ),
    )
    figures: str | None = Field(
        None,
        description=(
            "YAML file with `source` and `figures` (task: per cent), in place of a checkpoint."
        ),
    )
    served_name: str | None = Field(
        None,
        description=(
            "Id of the model at a server that is given with --server; null: the checkpoint's place."
        ),
    )
    flags: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] | None = Field(
        None, description="Flags of the server, in place of those of the card."
    )

    @model_validator(mode="after")
    def is_one_or_the_other(self) -> Self:
        if self.checkpoint and self.figures:
            raise ValueError("expected checkpoint or figures, found both")
        return self


class ServerSettings(Section):
    """The OpenAI-compatible server that is started where none is given. It is called with the
    checkpoint, the flags, --host and --port."""

    command: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        ("vllm", "serve"), description="The program and its first arguments."
    )
    gpus: int = Field(
        4,
        ge=0,
        le=1024,
        description="[GPUs] GPUs asked of Ray, and the server's --tensor-parallel-size.",
    )
    start_timeout_s: float = Field(
        3600.0,
        gt=0,
        le=10**7,
        description="[seconds] Time limit of its start, counted from when it has a node.",
    )


class BenchmarksConfig(Section):
    """Benchmarks of the finished checkpoint beside its base and the one-shot baseline. Nothing here
    changes an output byte."""

    base: ComparedCheckpoint | None = None
    baseline: ComparedCheckpoint | None = None
    ours: ComparedCheckpoint = ComparedCheckpoint()
    tasks: Annotated[tuple[BenchmarkTask, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        Field(
            LEADERBOARD,
            description=(
                "Rows of the table (entries below). Default: the tasks of the Open LLM"
                " Leaderboard's first version."
            ),
        )
    )
    include_path: str | None = Field(
        None, description="Folder with tasks of one's own, in the harness's form."
    )
    limit: int | None = Field(
        None,
        gt=0,
        le=10**9,
        description="[documents] How many of each task, for a trial; null: all.",
    )
    max_length: int = Field(
        8192,
        gt=0,
        le=2**30,
        description="[tokens] Longest request; the harness cuts longer ones off on the left.",
    )
    batch_size: int = Field(1, gt=0, le=10**6, description="[prompts] How many in one request.")
    concurrency: int = Field(
        32, gt=0, le=10**5, description="[requests] How many at the same time."
    )
    timeout_s: int = Field(1200, gt=0, le=10**7, description="[seconds] Time limit of one request.")
    tokenizer: OptionalPlace = Field(
        None,
        description="Folder or owner/name on the Hub, for the harness; null: the checkpoint's.",
    )
    harness_python: str | None = Field(
        None, description="Python that has lm-evaluation-harness; null: the job's own."
    )
    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def rows_and_columns_are_sound(self) -> Self:
        names = [t.task for t in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected each task once, found {names}")
        if self.ours.figures:
            raise ValueError("ours.figures: the run's own checkpoint is measured, not quoted")
        for role in ("base", "baseline"):
            column: ComparedCheckpoint | None = getattr(self, role)
            if column is not None and not (column.checkpoint or column.figures):
                raise ValueError(f"{role}: expected checkpoint or figures, found neither")
        return self

    def columns(self) -> dict[Role, ComparedCheckpoint]:
        """Those that are named, in the table's order."""
        named: dict[Role, ComparedCheckpoint | None] = {
            "base": self.base,
            "baseline": self.baseline,
            "ours": self.ours,
        }
        return {role: column for role, column in named.items() if column is not None}
