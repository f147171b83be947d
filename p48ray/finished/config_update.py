"""Write config.json of a finished checkpoint anew, and its digest in p48ray.json; nothing else.

Checkpoints of before named no linear in quantization_config.ignore. vLLM serves them; SGLang
refuses them, and TensorRT-LLM would quantize their attention (checkpoint.ignore).

config.json is written first. An update that was interrupted behind it is known by what config.json
would be with an empty list, which has the digest that p48ray.json still states: the same command
goes on.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from p48ray.checkpoint.families import describe_names
from p48ray.checkpoint.ignore import ignored
from p48ray.checkpoint.index import CONFIG_FILE, CONFIG_KEY, open_checkpoint
from p48ray.checkpoint.output_config import IGNORE_KEY, config_json
from p48ray.errors import ConfigError, ShardCorruptError
from p48ray.finished.survey import check_files, read_manifest
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.stages.index_proof import check_index_files
from p48ray.stages.verify import listed
from p48ray.store.base import Store


@dataclass(frozen=True, slots=True)
class ConfigUpdate:
    """What an update has done. patterns: those of quantization_config.ignore now. is_new: they were
    not there before."""

    patterns: tuple[str, ...]
    is_new: bool


def fill_ignore(checkpoint: Store) -> ConfigUpdate:
    """Fill an empty quantization_config.ignore. Does nothing where this version's list is there.

    Raises: ConfigError, naming file, key, expected and found, where there is no checkpoint of
        p48ray's or the list is neither empty nor this version's; ShardCorruptError where a file is
        not what p48ray.json says.
    """
    manifest = read_manifest(checkpoint)
    if problems := check_index_files(checkpoint):
        raise ShardCorruptError(f"{checkpoint.uri}: {listed(problems)}")
    raw = checkpoint.get(CONFIG_FILE)
    config = json.loads(raw)
    found = own_ignore(checkpoint, config)
    index = open_checkpoint(checkpoint)
    patterns = ignored(index, describe_names(index))
    if found not in ([], patterns):
        raise ConfigError(
            f"{checkpoint.uri}/{CONFIG_FILE}: {CONFIG_KEY}.{IGNORE_KEY}: expected an empty list or"
            f" the {len(patterns)} patterns of this version, found {found}; nothing was written"
        )
    check_unchanged(checkpoint, manifest, config)
    digest = hashlib.sha256(new := with_ignore(config, patterns)).hexdigest()
    if manifest.file_sha256[CONFIG_FILE] == digest:
        return ConfigUpdate(tuple(patterns), is_new=False)
    digests = manifest.file_sha256 | {CONFIG_FILE: digest}
    if raw != new:
        checkpoint.put(CONFIG_FILE, new)
    checkpoint.put(
        MANIFEST_FILE, manifest.model_copy(update={"file_sha256": digests}).sealed().to_json()
    )
    return ConfigUpdate(tuple(patterns), is_new=True)


def own_ignore(checkpoint: Store, config: dict[str, Any]) -> list[str]:
    """quantization_config.ignore as it is there. Raises: ConfigError"""
    quantization = config.get(CONFIG_KEY)
    found = quantization.get(IGNORE_KEY) if isinstance(quantization, dict) else None
    if not isinstance(found, list):
        raise ConfigError(
            f"{checkpoint.uri}/{CONFIG_FILE}: {CONFIG_KEY}.{IGNORE_KEY}: expected a list, found"
            f" {found!r}; nothing was written"
        )
    return found


def check_unchanged(
    checkpoint: Store, manifest: CheckpointManifest, config: dict[str, Any]
) -> None:
    """Raises: ShardCorruptError, naming the files beside the weights that anybody but this command
    has changed. config: config.json, parsed."""
    stated = manifest.file_sha256.get(CONFIG_FILE)
    is_interrupted = stated == hashlib.sha256(with_ignore(config, [])).hexdigest()
    problems = [
        problem
        for problem in check_files(checkpoint, manifest)
        if not (is_interrupted and problem.startswith(f"{CONFIG_FILE}: expected SHA-256"))
    ]
    if stated is None:
        problems.append(f"{MANIFEST_FILE}: file_sha256: expected {CONFIG_FILE} in it, found none")
    if problems:
        raise ShardCorruptError(
            f"{checkpoint.uri}: changed since it was written; nothing was written\n"
            f"{listed(problems)}"
        )


def with_ignore(config: dict[str, Any], patterns: list[str]) -> bytes:
    """config.json with another list and nothing else changed."""
    return config_json(config | {CONFIG_KEY: config[CONFIG_KEY] | {IGNORE_KEY: patterns}})
