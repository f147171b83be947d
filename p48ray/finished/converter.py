"""Conversion of a checkpoint folder to another form by one process or by many: the same bytes,
sooner."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from p48ray.checkpoint.index import CARD_FILE
from p48ray.checkpoint.modelopt import Form
from p48ray.finished.convert import (
    Conversion,
    begin_conversion,
    convert_shard,
    finish_conversion,
    survey_conversion,
)
from p48ray.finished.foreign import (
    ConvertedShard,
    convert_foreign_shard,
    errors_of,
    finish_foreign_conversion,
    foldings_of,
    is_converted,
    survey_foreign_conversion,
)
from p48ray.finished.foreign_units import is_foreign_folder
from p48ray.report.foreign_card import folding_summary, foreign_card
from p48ray.report.plan_table import size
from p48ray.report.storage_card import convert_card
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")

Shard = TypeVar("Shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion has come to. was_there: nothing was left to do. Bytes of experts and of all
    tensors, before and after. folding: in words, what sharing global scales has changed; of a
    checkpoint that others have compressed."""

    was_there: bool
    num_shards: int
    expert_bytes: tuple[int, int]
    all_bytes: tuple[int, int]
    folding: str | None = None


def convert_folder(checkpoint: Store, target: Store, to: Form, tasks: RayTasks | None) -> Converted:
    """Write the checkpoint in another form to `target`, shard by shard, with progress in
    bytes. The same call goes on where it was interrupted.

    Args:
        checkpoint, target: stores, each rooted at its folder.
        to: form of the target.
        tasks: where shards are converted; None for this process.
    Raises: UserError, ShardCorruptError or StageFailedError; shards that were finished stay.
    """
    if is_foreign_folder(checkpoint):
        return convert_foreign(checkpoint, target, to, tasks)
    conversion = survey_conversion(checkpoint, target, to)
    if not conversion.is_done:
        begin_conversion(target, conversion.note)
        held = {info.key: info.size_bytes for info in target.list()}
        finished = [s for s in conversion.shards if held.get(s.file) == s.result_bytes]
        each_shard(
            convert_shard,
            {s.file: (s, s.size_bytes) for s in conversion.shards},
            {s.file for s in finished},
            {"CHECKPOINT": checkpoint, "OUT": target},
            tasks,
        )
        finish_conversion(conversion, converted_card(conversion))
    return Converted(
        was_there=conversion.is_done,
        num_shards=len(conversion.shards),
        expert_bytes=conversion.expert_bytes,
        all_bytes=conversion.all_bytes,
    )


def convert_foreign(
    checkpoint: Store, target: Store, to: Form, tasks: RayTasks | None
) -> Converted:
    """convert_folder for a checkpoint that others have compressed (finished.foreign).

    Args:
        checkpoint, target, to, tasks: as convert_folder takes them.
    """
    conversion = survey_foreign_conversion(checkpoint, target, to)
    layout = conversion.layout
    num_experts = len(layout.moe_layers) * layout.num_experts
    if conversion.is_done:
        manifest = CheckpointManifest.load(target, MANIFEST_FILE)
        origin = manifest.foreign
        assert origin is not None
        foldings, errors = origin.foldings, manifest.relative_weight_errors
    else:
        begin_conversion(target, conversion.note)
        held = {info.key: info.size_bytes for info in target.list()}
        each_shard(
            convert_foreign_shard,
            {s.file: (s, s.size_bytes) for s in conversion.shards},
            {s.file for s in conversion.shards if is_converted(s, held)},
            {"CHECKPOINT": checkpoint, "OUT": target},
            tasks,
        )
        records = ConvertedShard.load_all(target, [s.record for s in conversion.shards])
        foldings, errors = foldings_of(records), errors_of(records)
        card = foreign_card(card_text(checkpoint), foldings, errors, num_experts)
        finish_foreign_conversion(conversion, records, card.encode())
        if left := conversion.source.left_behind:
            log.info("convert   not carried over: %s", ", ".join(left))
    return Converted(
        was_there=conversion.is_done,
        num_shards=len(conversion.shards),
        expert_bytes=conversion.expert_bytes,
        all_bytes=conversion.all_bytes,
        folding=folding_summary(foldings, errors, num_experts),
    )


def each_shard(
    convert: Callable[[Shard], int],
    shards: Mapping[str, tuple[Shard, int]],
    finished: Collection[str],
    stores: Mapping[str, Store],
    tasks: RayTasks | None,
) -> None:
    """Convert what is not finished, with progress in bytes.

    Args:
        convert: one shard.
        shards: file -> shard and its bytes.
        finished: files of those that were done before.
        stores: that workers need, by what they are on the command line.
        tasks: where shards are converted; None for this process.
    """
    sizes = {file: num_bytes for file, (_, num_bytes) in shards.items() if file not in finished}
    log.info(
        "convert   %d shards, %s, %d of them done before",
        len(shards),
        size(sum(num_bytes for _, num_bytes in shards.values())),
        len(finished),
    )
    done: Iterator[tuple[str, int]]
    if tasks is None:
        done = ((file, convert(shards[file][0])) for file in sizes)
    else:
        done = tasks.run(convert, {file: (shards[file][0],) for file in sizes}, dict(stores))
    before = Amount(len(finished), sum(shards[file][1] for file in finished))
    for _ in each_file("convert", done, sizes, before):
        pass


def card_text(checkpoint: Store) -> str:
    """README.md of a checkpoint; empty where there is none. What is not UTF-8 in it is replaced."""
    if checkpoint.head(CARD_FILE) is None:
        return ""
    return checkpoint.get(CARD_FILE).decode(errors="replace")


def converted_card(conversion: Conversion) -> bytes | None:
    """README.md of the target, None where the checkpoint has none. One that is not text is taken
    over as it is."""
    if conversion.checkpoint.head(CARD_FILE) is None:
        return None
    card = conversion.checkpoint.get(CARD_FILE)
    try:
        return convert_card(card.decode(), conversion.to, conversion.expert_bytes).encode()
    except UnicodeDecodeError:
        return card
