"""What the index and config.json of a checkpoint say, against its shards; and what else lies
there."""

import json
import re
from collections.abc import Mapping

from p48ray.checkpoint.index import CARD_FILE, CONFIG_FILE, INDEX_FILE
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.modelopt_config import format_problem
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.output_layout import OutputShard, shard_rows
from p48ray.store.base import Store

WEIGHT_SUFFIX = ".safetensors"


def check_index(
    checkpoint: Store, shards: tuple[OutputShard, ...], layout: ModelLayout
) -> list[str]:
    """The index names exactly the planned tensors in their shards; no other safetensors file lies
    beside them; no old quantization config is left."""
    problems = check_index_files(checkpoint)
    if problems:
        return problems
    planned = {name: shard.name for shard in shards for name, _, _ in shard_rows(shard, layout)}
    problems += compare_index(checkpoint, planned, sum(shard.num_bytes for shard in shards))
    files = {info.key for info in checkpoint.list() if info.key.endswith(".safetensors")}
    return problems + [f"{name}: not planned" for name in sorted(files - {s.name for s in shards})]


def compare_index(checkpoint: Store, expected: Mapping[str, str], total: int) -> list[str]:
    """The index (which check_index_files has found readable) against tensor -> file and the sum of
    all tensors' bytes."""
    index = json.loads(checkpoint.get(INDEX_FILE))
    found, metadata = index["weight_map"], index.get("metadata")
    differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    problems = [
        f"{INDEX_FILE}: {n}: expected {expected.get(n)}, found {found.get(n)}"
        for n in differing[:5]
    ]
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    return (
        problems
        if stated == total
        else [*problems, f"{INDEX_FILE}: metadata.total_size: expected {total}, found {stated}"]
    )


def check_index_files(checkpoint: Store) -> list[str]:
    """config.json and the index are there, are JSON, and name files that are there."""
    parsed = {}
    for name in (CONFIG_FILE, INDEX_FILE):
        if checkpoint.head(name) is None:
            return [f"{name}: missing"]
        try:
            parsed[name] = json.loads(checkpoint.get(name))
        except ValueError as error:
            return [f"{name}: not JSON: {error}"]
    weight_map = (
        parsed[INDEX_FILE].get("weight_map") if isinstance(parsed[INDEX_FILE], dict) else None
    )
    if not isinstance(weight_map, dict) or not isinstance(parsed[CONFIG_FILE], dict):
        return [f"{INDEX_FILE}: expected an object with a weight_map"]
    files = {str(v) for v in weight_map.values()}
    missing = sorted(
        f
        for f in files
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", f) or checkpoint.head(f) is None
    )
    return [f"{INDEX_FILE}: names {f!r}, which is not there" for f in missing] + check_config(
        parsed[CONFIG_FILE]
    )


def check_config(config: dict) -> list[str]:
    """The output's quantization config is one that is written, at the top level and nowhere
    else."""
    problem = format_problem(config)
    problems = [problem] if problem else []
    for key, value in config.items():
        if isinstance(value, dict) and "quantization_config" in value:
            problems.append(f"config.json: {key}.quantization_config: left over from the source")
    return problems


def check_strangers(checkpoint: Store, manifest: CheckpointManifest) -> list[str]:
    """Files that no manifest names: nobody verified them, and a loader may run what they hold.
    Weight files are the index's to name; the card is for people to edit."""
    known = {*manifest.file_sha256, *manifest.header_sha256, MANIFEST_FILE, CARD_FILE}
    found = sorted(info.key for info in checkpoint.list())
    return [
        f"{name}: not in {MANIFEST_FILE}, so nobody made or verified it; move it out of the folder"
        for name in found
        if name not in known and not name.endswith(WEIGHT_SUFFIX)
    ]
