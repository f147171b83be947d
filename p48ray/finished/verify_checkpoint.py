"""Verify a checkpoint folder on its own: what `p48ray verify` does. With the source at hand it
proves what the job's own verification proves.

Three steps, so that the bytes may be read by many processes: `survey_checkpoint` looks at
everything but the data (index, headers, manifest, the small files) and makes one check a file;
`check_shard` reads one file through, wherever it runs; `combine_findings` puts the findings
together, in the files' order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from p48ray.checkpoint.finite_values import FiniteCheck, NotFinite
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.modelopt import dense_from_modelopt, storage_in
from p48ray.checkpoint.storage_stream import dense_sha256
from p48ray.checkpoint.tensors import read_together
from p48ray.errors import SourceError
from p48ray.finished.foreign_verify import foreign_notes, foreign_problems
from p48ray.finished.survey import ForeignCheck, ShardCheck, SourcedCheck, Survey
from p48ray.run.output_layout import unit_tensor_names
from p48ray.run.plan import WorkUnit
from p48ray.run.records import Record
from p48ray.stages.read_ahead import ReadUnit, read_unit, readers, tensor_digest
from p48ray.stages.shard_proof import check_unit, verify_shard


class CheckpointVerdict(Record):
    """What verification of a folder found. `compared_with_source` tells how much it could prove;
    `notes` are of values that are not finite, and were so in the source."""

    checkpoint: str
    compared_with_source: bool
    num_shards: int
    num_linears: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileFindings:
    """Of one file, in words: what is wrong with it, and what is to be known."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_shard(check: ShardCheck) -> FileFindings:
    """Read one file of the checkpoint through."""
    if isinstance(check, ForeignCheck):
        return FileFindings(tuple(foreign_problems(check)), tuple(foreign_notes(check)))
    if isinstance(check, SourcedCheck):
        proof = verify_shard(
            check.checkpoint, check.source, check.layout, check.shard, check.promise
        )
        return FileFindings(tuple(proof.problems), proof.notes)
    problems, notes = [], []
    with readers(check.size_bytes) as threads:

        def read(unit: tuple[WorkUnit, tuple[str, ...]]) -> ReadUnit | str:
            entries = [check.entries[name] for name in unit_tensor_names(unit[1], check.form)]
            if check.form != "modelopt":
                return read_unit(check.checkpoint, entries, check.form, dict)
            stored = read_together(check.checkpoint, entries)
            try:
                dense = dense_from_modelopt(stored, check.global_scales)
            except SourceError as error:
                return str(error)
            return ReadUnit(stored=dense, originals={}, digest=dense_sha256(dense))

        def digest_of(name: str) -> tuple[str, NotFinite]:
            entry = check.entries[name]
            values = FiniteCheck(entry.dtype, entry.shape)
            digest = tensor_digest(check.checkpoint, entry, threads.reads, values)
            return digest, values.found

        for (unit, linears), stored in threads.in_order(read, check.units):
            if isinstance(stored, str):
                problems.append(f"{check.file}: unit {unit.id}: {stored}")
                continue
            firsts = range(0, len(linears), len(PROJECTIONS))
            experts = [
                (dict(zip(PROJECTIONS, linears[at : at + len(PROJECTIONS)], strict=True)), None)
                for at in firsts
            ]
            problems += check_unit(
                check.file,
                unit.id,
                stored,
                experts,
                check.promise,
                storage_in(check.form),
                threads,
            ).all
        for name, (found, bad) in threads.in_order(digest_of, sorted(check.untouched)):
            if found != (digest := check.untouched[name]):
                problems.append(
                    f"{check.file}: {name}: bytes differ from those that were verified: expected"
                    f" SHA-256 {digest}, found {found}" + (f"; holds {bad}" if bad else "")
                )
            elif bad:
                notes.append(f"{check.file}: {name}: holds {bad}, as when it was verified")
    return FileFindings(tuple(problems), tuple(notes))


def combine_findings(survey: Survey, found: Mapping[str, FileFindings]) -> CheckpointVerdict:
    """The verdict, the same in whatever order the files were read. found: of every file that was to
    be checked."""
    of_shards = [problem for check in survey.checks for problem in found[check.file].problems]
    return CheckpointVerdict(
        checkpoint=survey.checkpoint,
        compared_with_source=survey.compared_with_source,
        num_shards=survey.num_shards,
        num_linears=survey.num_linears,
        problems=(*survey.problems, *of_shards, *survey.file_problems),
        notes=tuple(note for check in survey.checks for note in found[check.file].notes),
    )
