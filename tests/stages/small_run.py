"""A small run of the whole job in this process: made once a session, looked at by many tests,
copied by those that change something."""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from p48ray.config import RunConfig
from p48ray.config.load import load_config
from p48ray.report.report import Report
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.runner.local_runner import LocalRunner
from p48ray.runner.pipeline import run_job
from p48ray.stages.inputs import write_inputs
from p48ray.stages.prepare import Prepared, prepare
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY

SETTINGS = (
    f"calibration.documents={TINY}/calibration.jsonl",
    "calibration.num_sequences=6",
    "calibration.sequence_length=64",
    "calibration.sequences_per_part=2",
    "compression.solver=block_descent",
    "compression.output_curvature=false",
    "compression.sweeps=1",
    "compression.code_sweeps=0",
    "compression.refine_steps=0",
    f"evaluation.documents={TINY}/heldout.jsonl",
    "evaluation.num_sequences=3",
    "evaluation.sequence_length=64",
    "evaluation.sequences_per_part=2",
    "output.max_shard_size=2MB",
    "run.experts_per_unit=8",
)

SIDECARS = {
    "tokenization_tiny.py": b'raise RuntimeError("code of a source folder must not run")\n',
    "chat_template.jinja": b"{{ messages }}\n",
    "LICENSE": b"of the source\n",
    "tiktoken.model": bytes(range(256)),
}
"""What the small model's folder lacks of a real one's. The code would say so if it ran."""

NOT_CARRIED = {
    "notes.jsonl": b'{"text": "a text"}\n',
    "pytorch_model.bin": b"weights in another form",
    ".hidden": b"",
    "README.md": b"# source\n",
}


@dataclass(frozen=True)
class SmallRun:
    """A finished run: its folder, its source's folder, and what was prepared and reported."""

    root: Path
    source: Path
    prepared: Prepared
    report: Report

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def context(self) -> StageContext:
        return self.prepared.context


def configure(source: Path | str, root: Path | str, *overrides: str) -> RunConfig:
    return load_config(
        REPO / "configs" / "tiny.yaml",
        (f"source.checkpoint={source}", *SETTINGS, *overrides),
        str(root),
    )


def run_locally(prepared: Prepared) -> Report:
    def local(plan: RunPlan, uri: str) -> nullcontext[LocalRunner]:
        return nullcontext(LocalRunner(plan, uri))

    return run_job(prepared, local)


PACKED: dict[str, dict[str, bytes]] = {}
"""Packed texts by the digest of the units that they are for."""


def write_inputs_once(prepared: Prepared) -> None:
    """`write_inputs`, with the texts that another run of the same plan has packed in this process:
    a tokenizer takes two seconds for them."""
    store, digest = prepared.store, prepared.plan.units_digest
    for key, data in PACKED.get(digest, {}).items():
        store.put(key, data)
    write_inputs(prepared)
    PACKED[digest] = {
        key: store.get(key) for key in (run_root.TOKENS, run_root.manifest_of(run_root.TOKENS))
    }


@cache
def finished_run(base: Path) -> SmallRun:
    """The run of this session, in `base`. Nobody changes it."""
    source, root = base / "source", base / "run"
    shutil.copytree(TINY, source, dirs_exist_ok=True)
    for name, data in (SIDECARS | NOT_CARRIED).items():
        (source / name).write_bytes(data)
    prepared = prepare(configure(source, root))
    return SmallRun(root=root, source=source, prepared=prepared, report=run_locally(prepared))
