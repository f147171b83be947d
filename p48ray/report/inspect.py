"""One compressed linear up close: which pairs were kept, how the scales and codes are spread, how
far the weights moved.

Legend: O out, G scale groups (16 inputs each).
"""

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from p48ray.checkpoint.decode import read_expert
from p48ray.checkpoint.families import describe_any, describe_foreign
from p48ray.checkpoint.foreign import Folding, is_foreign, read_linear
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import EXPERT_NAME
from p48ray.checkpoint.modelopt import WEIGHT_DIVISOR, Form, GlobalScales, form_suffixes
from p48ray.checkpoint.modelopt_config import form_of, format_problem
from p48ray.checkpoint.sparse_storage import PACKED, doubled
from p48ray.checkpoint.storage_stream import as_dense
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import ConfigError
from p48ray.numerics import e2m1, nvfp4, paired48
from p48ray.numerics.relative_errors import relative_weight_error
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.output_layout import unit_tensor_names
from p48ray.run.records import Record
from p48ray.store.base import Store


class Inspection(Record):
    """Histograms of one linear. Patterns are named by the pairs kept of four."""

    name: str
    shape: tuple[int, int]
    weight_global_scale: float
    input_global_scale: float
    patterns: dict[str, int]
    illegal_groups: int
    scales: dict[str, int]
    codes: dict[str, int]
    zero_share: float
    relative_weight_error: float | None
    folding: Folding | None = None


def inspect_linear(checkpoint: Store, linear: str | None, source: Store | None) -> Inspection:
    """Read one linear of a compressed checkpoint.

    Args:
        linear: module name, None for the first one.
        source: for the weight error.
    Raises: ConfigError when the checkpoint has no such compressed linear, with the names that are
        near.
    """
    index = open_checkpoint(checkpoint)
    manifest = None
    if checkpoint.head(MANIFEST_FILE) is not None:
        manifest = CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    is_theirs = manifest is None and is_foreign(index.config)
    name, tensors = (foreign_linear if is_theirs else own_linear)(index, linear)
    packed, scale, divisor, divisor_in = (
        tensors[s]
        for s in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    )
    codes = e2m1.unpack(packed)
    values = nvfp4.dequantize(codes[None], scale[None], divisor)
    error = None
    if source is not None:
        original = open_checkpoint(source)
        found = EXPERT_NAME.fullmatch(f"{name}.weight_packed")
        assert found is not None
        weights = read_expert(original, describe_any(original), int(found[2]), int(found[3]))
        shift = 2.0 ** (manifest.shifts.get(name, 0) if manifest else 0)
        error = relative_weight_error(shift * weights[found[4]].float()[None], values).item()
    counts = codes.flatten().bincount(minlength=16).tolist()
    signed = {
        code_name(c): counts[c] for c in (*range(15, 8, -1), *([8] if counts[8] else []), *range(8))
    }
    return Inspection(
        name=name,
        shape=(codes.shape[0], codes.shape[1]),
        weight_global_scale=divisor.item(),
        input_global_scale=divisor_in.item(),
        patterns=dict(
            zip(pattern_names(), paired48.pattern_histogram(packed).tolist(), strict=True)
        ),
        illegal_groups=int(paired48.find_illegal(packed).sum()),
        scales=scale_histogram(scale.float()),
        codes=signed,
        zero_share=counts[0] / codes.numel(),
        relative_weight_error=error,
        folding=manifest.foreign.foldings.get(name) if manifest and manifest.foreign else None,
    )


def own_linear(index: CheckpointIndex, linear: str | None) -> tuple[str, dict[str, Tensor]]:
    """A linear's name, and its tensors in dense storage by suffix.

    Args:
        index: of a checkpoint that p48ray has written.
        linear: as inspect_linear takes it.
    """
    form = form_in(index)
    name = choose(sorted(compressed_linears(index, form)), linear, index.store.uri)
    entries = [index.tensors[stored] for stored in unit_tensor_names([name], form)]
    kept = kept_scales(index.store) if form == "modelopt" else {}
    tensors = as_dense(read_tensors(index.store, entries), form, kept)
    return name, {n.removeprefix(f"{name}."): tensor for n, tensor in tensors.items()}


def foreign_linear(index: CheckpointIndex, linear: str | None) -> tuple[str, dict[str, Tensor]]:
    """own_linear, of a checkpoint that others have compressed: its own global scale, and each block
    scale for both its halves."""
    layout = describe_foreign(index)
    first, *others = layout.expert_suffixes
    ends = f".{first}"
    names = sorted(n.removesuffix(ends) for n in index.tensors if n.endswith(ends))
    name = choose(names, linear, index.store.uri)
    entries = [index.tensors[f"{name}.{suffix}"] for suffix in (first, *others)]
    stored = {n.removeprefix(f"{name}."): t for n, t in read_tensors(index.store, entries).items()}
    where = f"{index.store.uri}/{entries[0].file}: tensor {name}"
    found = read_linear(stored, layout.expert_storage, where)
    return name, {
        "weight_packed": found.packed,
        "weight_scale": doubled(found.scale),
        "weight_global_scale": torch.tensor([found.weight_divisor]),
        "input_global_scale": torch.tensor([found.input_divisor]),
    }


def form_in(index: CheckpointIndex) -> Form:
    """That the config announces; dense for one of another format, which has no compressed
    linears."""
    return "dense" if format_problem(index.config) else form_of(index.config)


def compressed_linears(index: CheckpointIndex, form: Form) -> Iterator[str]:
    codes, divisor = (form_suffixes(s, form)[0] for s in (PACKED, WEIGHT_DIVISOR))
    for name in index.tensors:
        linear, _, suffix = name.rpartition(".")
        if suffix == codes and f"{linear}.{divisor}" in index.tensors:
            yield linear


def kept_scales(checkpoint: Store) -> GlobalScales:
    """Raises: ConfigError for a folder in ModelOpt's layout that p48ray did not write."""
    found = None
    if checkpoint.head(MANIFEST_FILE) is not None:
        found = CheckpointManifest.load(checkpoint, MANIFEST_FILE).modelopt
    if found is None:
        raise ConfigError(
            f"{checkpoint.uri}/{MANIFEST_FILE}: expected modelopt.global_scales, as p48ray convert"
            " --format modelopt keeps them, found none"
        )
    return found.global_scales


def choose(names: list[str], wanted: str | None, uri: str) -> str:
    if not names:
        raise ConfigError(
            f"{uri}: expected compressed expert linears, found none; is this the checkpoint/ folder"
            " of a p48ray run?"
        )
    if wanted is None:
        return names[0]
    if wanted not in names:
        near = [n for n in names if wanted in n][:3] or names[:1]
        raise ConfigError(
            f"--linear: {uri} has no compressed linear {wanted!r}; for instance {', '.join(near)}"
        )
    return wanted


def pattern_names() -> list[str]:
    return ["".join("x" if kept else "." for kept in row) for row in paired48.PATTERNS]


def code_name(code: int) -> str:
    """-6 to +6 with its sign; minus zero, which a sound checkpoint does not hold, apart from 0."""
    value = e2m1.decode(torch.tensor([code], dtype=torch.uint8)).item()
    return f"{value:+g}" if value else "-0" if code else "0"


def scale_histogram(scale_OG: Tensor) -> dict[str, int]:
    """Counts of E4M3 scales by power of two, largest last; scales that a sound checkpoint does not
    hold come first, as one count."""
    is_sound_OG = torch.isfinite(scale_OG) & (scale_OG > 0)
    unsound = int((~is_sound_OG).sum())
    counted = {"not above 0": unsound} if unsound else {}
    if unsound == scale_OG.numel():
        return counted
    exponents = scale_OG[is_sound_OG].log2().floor().int()
    low, high = int(exponents.min()), int(exponents.max())
    counts = (exponents - low).bincount(minlength=high - low + 1).tolist()
    return counted | {f"2^{low + i}": count for i, count in enumerate(counts)}


def print_inspection(found: Inspection, console: Console) -> None:
    """The inspection as bars."""
    console.print(f"{found.name}  {found.shape[0]} x {found.shape[1]}", soft_wrap=True)
    console.print(
        f"weight_global_scale {found.weight_global_scale:.6g}, input_global_scale"
        f" {found.input_global_scale:.6g}, zeros {found.zero_share:.1%}"
    )
    if found.relative_weight_error is not None:
        console.print(f"relative weight error |W - Q|^2 / |W|^2: {found.relative_weight_error:.5f}")
    if (folding := found.folding) is not None:
        console.print(
            f"block scales times {folding.ratio:.6g}, to share a global scale:"
            f" {folding.num_rounded:,} of {folding.num_groups:,} rounded, by"
            f" {folding.largest_rounding:.4%} at most; {folding.num_vanished:,} became zero"
        )
    if found.illegal_groups:
        console.print(
            f"{found.illegal_groups} groups of 8 inputs keep more than 2 of 4 pairs: not paired-4:8"
        )
    for title, counts in (
        ("pairs kept of four", found.patterns),
        ("E4M3 scales", found.scales),
        ("E2M1 codes", found.codes),
    ):
        console.print(text_bars(title, counts))


def text_bars(title: str, counts: dict[str, int]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    total, most = sum(counts.values()) or 1, max(counts.values()) or 1
    for name, count in counts.items():
        table.add_row(name, f"{count / total:6.1%}", "#" * round(40 * count / most))
    return table
