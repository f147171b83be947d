"""What a conversion from one form of a checkpoint to another comes to, beside the bytes of units:
may it be, do the scalars allow it, and header rows, index and small files as they will be."""

from collections.abc import Collection, Mapping
from typing import Any

from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CONFIG_FILE
from p48ray.checkpoint.modelopt import FORM_WORDS, Form, rename_rows, renamed, storage_in
from p48ray.checkpoint.modelopt_config import HF_QUANT_FILE, modelopt_files, restored_config
from p48ray.checkpoint.output_config import config_json
from p48ray.checkpoint.sparse_storage import TensorRow, convert_config, convert_index, convert_rows
from p48ray.errors import ConfigError, SourceError
from p48ray.finished.forms import global_scales_of, read_scalars, scalar_problems
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.store.base import Store

LISTED_REFUSALS = 5  # in one line


def raise_for_problems(checkpoint: Store, problems: list[str]) -> None:
    """Raises: SourceError where there are any."""
    if problems:
        more = (
            f" (and {len(problems) - LISTED_REFUSALS} more)"
            if len(problems) > LISTED_REFUSALS
            else ""
        )
        raise SourceError(
            f"{checkpoint.uri}: can not be converted: {'; '.join(problems[:LISTED_REFUSALS])}{more}"
        )


def check_forms_fit(checkpoint: Store, manifest: CheckpointManifest, have: Form, to: Form) -> None:
    """See that there is something to convert, and that what is wanted can hold it.

    Args:
        checkpoint: for messages.
        manifest: of the checkpoint.
        have, to: the form that it has, and the one that is wanted.
    Raises: ConfigError where nothing is to be converted, or not in one step; SourceError where the
        plan's settings rule sparse storage out.
    """
    if have == to:
        raise ConfigError(f"{checkpoint.uri} has {FORM_WORDS[to]} already; nothing was written")
    if "dense" not in (have, to):
        raise ConfigError(
            f"{checkpoint.uri}: {CONFIG_FILE}: expected dense storage, of which alone"
            f" {FORM_WORDS[to]} is made, found {FORM_WORDS[have]}; convert it to dense storage"
            " first; nothing was written"
        )
    if (have == "modelopt") != (manifest.modelopt is not None):
        found = "none" if manifest.modelopt is None else "one"
        raise SourceError(
            f"{checkpoint.uri}/{MANIFEST_FILE}: modelopt: {CONFIG_FILE} announces"
            f" {FORM_WORDS[have]}, found {found}"
        )
    if to != "sparse":
        return
    first = next(iter(manifest.relative_weight_errors), "no linear")
    for key, value, expected in (
        ("sparsity", manifest.sparsity, "paired-4:8"),
        ("scale_span", manifest.scale_span, 32),
    ):
        if value != expected:
            raise SourceError(
                f"{checkpoint.uri}/{MANIFEST_FILE}: {key}: expected {expected} for sparse storage,"
                f" found {value} (of {first} and all other linears)"
            )


def check_scalars(
    checkpoint: Store,
    manifest: CheckpointManifest,
    entries: Mapping[str, TensorEntry],
    have: Form,
    to: Form,
) -> dict[str, tuple[float, float]]:
    """Every linear's global scales as stored, where they are to become their reciprocals or come
    from them; nothing is read where they stay.

    Args:
        checkpoint, manifest: of the checkpoint.
        entries: every tensor of the checkpoint by name.
        have, to: the form that it has, and the one that is wanted.
    Raises: SourceError, naming file and tensor, for one that has no reciprocal, or that is not the
        reciprocal of what p48ray.json keeps.
    """
    if "modelopt" not in (have, to):
        return {}
    scalars = read_scalars(checkpoint, manifest, entries, have)
    kept = global_scales_of(manifest)
    raise_for_problems(checkpoint, list(scalar_problems(scalars, kept, entries, have)))
    return scalars


def small_files(
    checkpoint: Store, manifest: CheckpointManifest, config: Mapping[str, Any], have: Form, to: Form
) -> dict[str, bytes]:
    """config.json in another form, and what else says how to read the weights.

    Args:
        checkpoint, manifest: of the checkpoint.
        config: its config.json.
        have, to: the form that it has, and the one that is wanted.
    Raises: SourceError for a file that could not be restored, or would be written over.
    """
    if manifest.modelopt is not None:
        return {
            CONFIG_FILE: config_json(restored_config(config, manifest.modelopt.quantization_config))
        }
    if to != "modelopt":
        storage, other = storage_in(to), storage_in(have)
        found = convert_config(config, storage)
        check_restored(checkpoint, CONFIG_FILE, config_json(convert_config(found, other)))
        return {CONFIG_FILE: config_json(found)}
    if HF_QUANT_FILE in manifest.file_sha256:
        raise SourceError(
            f"{checkpoint.uri}/{HF_QUANT_FILE}: expected none, because ModelOpt's layout has one of"
            " its own, found one"
        )
    check_restored(checkpoint, CONFIG_FILE, config_json(config))
    new, older = modelopt_files(config, manifest.relative_weight_errors)
    return {CONFIG_FILE: config_json(new), HF_QUANT_FILE: config_json(older)}


def rows_in(
    to: Form, rows: list[TensorRow], linears: Collection[str], have: Form
) -> list[TensorRow]:
    """Header rows in another form.

    Args:
        to, have: the form that is wanted, and the one that they have.
        rows: of one file or many.
        linears: names of the compressed linears.
    """
    if "modelopt" in (have, to):
        return rename_rows(rows, linears, to)
    return convert_rows(rows, linears, storage_in(to))


def index_in(
    to: Form, index: Mapping[str, Any], linears: Collection[str], have: Form, total_bytes: int
) -> dict[str, Any]:
    """model.safetensors.index.json in another form.

    Args:
        to, have: the form that is wanted, and the one that it has.
        index: the parsed file.
        linears: names of the compressed linears.
        total_bytes: of all tensors in the form that is wanted.
    """
    if "modelopt" not in (have, to):
        return convert_index(index, linears, storage_in(to), total_bytes)
    weight_map = {renamed(n, linears, to): file for n, file in index["weight_map"].items()}
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def check_restored(checkpoint: Store, name: str, restored: bytes) -> None:
    """Raises: SourceError unless converting a small file there and back gives its bytes."""
    if restored != checkpoint.get(name):
        raise SourceError(
            f"{checkpoint.uri}/{name}: expected it as p48ray writes it, found another form, which"
            " could not be restored"
        )
