"""The files of a finished checkpoint beside its shards and its card. They are written once every
shard is verified, the index last: who finds an index finds a whole checkpoint."""

import hashlib
from collections.abc import Sequence
from typing import Any

from p48ray.checkpoint.header import unmarked
from p48ray.checkpoint.index import CONFIG_FILE, INDEX_FILE
from p48ray.checkpoint.output_config import config_json, index_json, output_config
from p48ray.checkpoint.sparse_storage import convert_config
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.manifest import ShardVerdict, UnitManifest
from p48ray.run.output_layout import OutputShard, shard_rows
from p48ray.run.plan import WorkUnit
from p48ray.run.scales import shifted_linears
from p48ray.unit.context import StageContext


def finish_checkpoint(
    context: StageContext,
    shards: tuple[OutputShard, ...],
    verdicts: Sequence[ShardVerdict],
    units: Sequence[UnitManifest],
) -> None:
    """Everything but shards and card: sidecar files, config, the checkpoint's own manifest, and
    last the index.

    Args:
        context: of the run.
        shards: all that the plan has.
        verdicts: of all shards; whoever read them through has hashed what lies in them.
        units: manifests of all the plan's units.
    """
    source = context.source
    files = {name: unmarked(name, source.store.get(name)) for name in source.sidecars}
    config = output_config(source, context.layout)
    if context.plan.config.output.storage == "sparse":
        config = convert_config(config, "sparse")
    files[CONFIG_FILE] = config_json(config)
    index = index_json(shard_index(context, shards))
    for name, data in files.items():
        context.store.put(run_root.checkpoint_file(name), data)
    digests = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in {**files, INDEX_FILE: index}.items()
    }
    context.store.put(
        run_root.checkpoint_file(MANIFEST_FILE),
        checkpoint_manifest(context, verdicts, units, digests).to_json(),
    )
    context.store.put(run_root.checkpoint_file(INDEX_FILE), index)


def shard_index(context: StageContext, shards: tuple[OutputShard, ...]) -> dict[str, Any]:
    """model.safetensors.index.json: which shard holds which tensor."""
    weight_map = {
        name: shard.name for shard in shards for name, _, _ in shard_rows(shard, context.layout)
    }
    return {
        "metadata": {"total_size": sum(s.num_bytes for s in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def checkpoint_manifest(
    context: StageContext,
    verdicts: Sequence[ShardVerdict],
    units: Sequence[UnitManifest],
    files: dict[str, str],
) -> CheckpointManifest:
    """The checkpoint's own manifest (p48ray.json), sealed.

    Args:
        context, verdicts, units: as finish_checkpoint takes them.
        files: SHA-256 of each file beside the shards, by name; the index among them.
    """
    plan = context.plan
    compression = plan.config.compression
    return CheckpointManifest(
        plan_digest=plan.digest,
        source_fingerprint=plan.source.fingerprint,
        sparsity=compression.sparsity,
        scale_span=compression.scale_span,
        activation_group=compression.activation_group,
        experts_per_unit=plan.config.run.experts_per_unit,
        max_shard_size=plan.config.output.max_shard_size,
        relative_weight_errors={r.name: r.relative_weight_error for u in units for r in u.linears},
        shifts={
            name: exponent
            for u in units
            for name, exponent in shifted_linears(
                context.layout, WorkUnit.layer_of(u.unit), u.shifts
            ).items()
        },
        unit_sha256={u.unit: u.sha256 for u in units},
        untouched_sha256={
            name: digest for v in verdicts for name, digest in v.untouched_sha256.items()
        },
        header_sha256={v.shard: v.header_sha256 for v in verdicts},
        file_sha256=files,
    ).sealed()
