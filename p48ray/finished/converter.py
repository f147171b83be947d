"""Conversion of a checkpoint folder to another form by one process or by many: the same bytes,
sooner."""

import logging
from collections.abc import Iterator

from p48ray.checkpoint.index import CARD_FILE
from p48ray.checkpoint.modelopt import Form
from p48ray.finished.convert import (
    Conversion,
    begin_conversion,
    convert_shard,
    finish_conversion,
    survey_conversion,
)
from p48ray.report.plan_table import size
from p48ray.report.storage_card import convert_card
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")


def convert_folder(
    checkpoint: Store, target: Store, to: Form, tasks: RayTasks | None
) -> Conversion:
    """Write the checkpoint in another form to `target`, shard by shard, with progress in
    bytes. The same call goes on where it was interrupted.

    Args:
        checkpoint, target: stores, each rooted at its folder.
        to: form of the target.
        tasks: where shards are converted; None for this process.
    Raises: UserError, ShardCorruptError or StageFailedError; shards that were finished stay.
    """
    conversion = survey_conversion(checkpoint, target, to)
    if conversion.is_done:
        return conversion
    begin_conversion(conversion)
    held = {info.key: info.size_bytes for info in target.list()}
    finished = [s for s in conversion.shards if held.get(s.file) == s.result_bytes]
    missing = {s.file: s for s in conversion.shards if held.get(s.file) != s.result_bytes}
    sizes = {file: shard.size_bytes for file, shard in missing.items()}
    log.info(
        "convert   %d shards, %s, %d of them done before",
        len(conversion.shards),
        size(sum(s.size_bytes for s in conversion.shards)),
        len(finished),
    )
    done: Iterator[tuple[str, int]]
    if tasks is None:
        done = ((file, convert_shard(shard)) for file, shard in missing.items())
    else:
        items = {file: (shard,) for file, shard in missing.items()}
        done = tasks.run(convert_shard, items, {"CHECKPOINT": checkpoint, "OUT": target})
    before = Amount(len(finished), sum(s.size_bytes for s in finished))
    for _ in each_file("convert", done, sizes, before):
        pass
    finish_conversion(conversion, converted_card(conversion))
    return conversion


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
