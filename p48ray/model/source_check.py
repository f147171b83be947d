"""The source held against its config before anything is spent on it: what the model's layers,
embedding, last norm and head need is in the headers, and layers of these shapes run.

Nothing is read but headers: transformers' own modules are built and run on the meta device, where
tensors have shapes and no values (Kimi-K2.5: some seconds). The routed experts are held against
the config by checkpoint.expert_checks.

Legend: B sequences, S positions, H hidden size.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from p48ray.checkpoint.expert_checks import FLOATS
from p48ray.checkpoint.families import FAMILIES
from p48ray.checkpoint.families.record import TextConfig
from p48ray.checkpoint.fp8 import PlainTensor, as_plain
from p48ray.checkpoint.index import CONFIG_FILE, MAX_LISTED, CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.errors import SourceError
from p48ray.model.architecture import (
    NOT_PASSED,
    Architecture,
    architecture,
    empty_layer,
    model_config,
)
from p48ray.model.decoder import run_layer

TRIED_TOKENS = 2
"""Length of the sequence that a layer is run on."""

MAX_BLAMED, MAX_SHOWN = 3, 200
"""Keys, and characters of a value, in one message."""

ConfigValues = Mapping[str, Any]


class NoExperts(nn.Module):
    """In the place of a mixture's experts: an answer of the right shape."""

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        """Zeros like the hidden states."""
        return torch.zeros_like(hidden)


def check_source(index: CheckpointIndex, layout: ModelLayout) -> None:
    """All checks of this module.

    Raises: SourceError, naming config.json and the key, for a config with which transformers'
        classes can not be made, built or run; naming file and tensor for one that is missing, left
        over, or of another shape or type than the config says.
    """
    arch = architecture(FAMILIES[layout.family])
    text = TextConfig(layout.text_config, layout.text_config_path)
    name = arch.layer.__name__
    with quiet():
        try_out(
            f"transformers' {arch.config.__name__} can be made",
            text,
            lambda values: model_config(arch, values),
        )
        check_whole_config(index, arch)
        try_out(
            f"transformers' {arch.rotary.__name__} can be made",
            text,
            lambda values: rotary_embedding(arch, model_config(arch, values)),
        )
        try_out(
            f"transformers' {name} can be built",
            text,
            lambda values: build_kinds(arch, layout, values),
        )
        config = model_config(arch, layout.text_config)
        check_layers(index, layout, arch, config)
        check_ends(index, layout, config)
        try_out(
            f"transformers' {name} can be run", text, lambda values: run_kinds(arch, layout, values)
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks on a config that transformers would make for each try, and torch's on
    tensors without elements. Those who run the model hear them."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def check_whole_config(index: CheckpointIndex, arch: Architecture) -> None:
    """The class that transformers has for the whole of config.json, with its vision part, where it
    has one: the tokenizer is loaded through it."""
    from transformers import CONFIG_MAPPING

    model_type = index.config["model_type"]
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] is arch.config:
        return
    whole = CONFIG_MAPPING[model_type]
    try_out(
        f"transformers' {whole.__name__} can be made",
        TextConfig(index.config),
        lambda values: whole.from_dict(
            deepcopy({k: v for k, v in values.items() if k not in NOT_PASSED})
        ),
    )


def try_out(what: str, text: TextConfig, work: Callable[[ConfigValues], object]) -> None:
    """Try something with a config's values.

    The keys to blame are those without which it works: transformers then takes its own value.

    Args:
        what: it is, for the message.
        text: the values, and where in config.json they stand.
        work: raises whatever it likes.
    Raises: SourceError.
    """
    try:
        work(text.values)
    except Exception as error:  # transformers raises what it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        blamed = list(blame(text.values, lambda values: does_work(work, values)))[:MAX_BLAMED]
        found = [
            f"{TextConfig({}, (*text.path, *path[:-1])).where(path[-1])}: found"
            f" {repr(value)[:MAX_SHOWN]}"
            for path, value in blamed
        ] or [": ".join((CONFIG_FILE, *filter(None, [".".join(text.path)])))]
        raise SourceError(
            f"{', or '.join(found)}: expected a value with which {what} ({reason})"
        ) from error


def blame(
    values: ConfigValues, works: Callable[[ConfigValues], bool]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths of keys without which it works, with their values."""
    for key, value in values.items():
        if not works({name: other for name, other in values.items() if name != key}):
            continue

        def works_with(inner: ConfigValues, key: str = key) -> bool:
            return works({**values, key: inner})

        inner = list(blame(value, works_with)) if isinstance(value, dict) else []
        yield from (((key, *path), found) for path, found in inner or [((), value)])


def does_work(work: Callable[[ConfigValues], object], values: ConfigValues) -> bool:
    try:
        work(values)
    except Exception:  # noqa: BLE001 (see try_out)
        return False
    return True


def kinds_of_layers(layout: ModelLayout) -> list[int]:
    """The first layer of each kind: dense or with experts, and what attention the config gives it
    (transformers' layer_types)."""
    types = layout.text_config.get("layer_types")
    firsts: dict[tuple[bool, object], int] = {}
    for number in range(layout.num_layers):
        kind = types[number] if isinstance(types, list) and number < len(types) else None
        firsts.setdefault((number in layout.moe_layers, str(kind)), number)
    return list(firsts.values())


def built(arch: Architecture, layout: ModelLayout, config: Any, number: int) -> Any:
    """A layer whose routed experts answer nothing, on the meta device.

    Args:
        arch, config: the family's classes, and what model_config made.
        layout: says which layers have experts.
        number: of the layer, from 0.
    """
    return empty_layer(arch, config, number, NoExperts() if number in layout.moe_layers else None)


def rotary_embedding(arch: Architecture, config: Any) -> Any:
    """Raises: ValueError for a type that transformers does not know, and whatever it has against
    the other values."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"rope type {kind!r} is none of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    return arch.rotary(config)


def build_kinds(arch: Architecture, layout: ModelLayout, values: ConfigValues) -> None:
    config = model_config(arch, values)
    for number in kinds_of_layers(layout):
        built(arch, layout, config, number)


def run_kinds(arch: Architecture, layout: ModelLayout, values: ConfigValues) -> None:
    """A layer of each kind on two tokens, as capture runs it."""
    config = model_config(arch, values)
    cos, sin = rotary_embedding(arch, config)(torch.empty(0), torch.arange(TRIED_TOKENS)[None])
    x_BSH = torch.empty(1, TRIED_TOKENS, config.hidden_size, device="meta")
    with torch.no_grad():
        for number in kinds_of_layers(layout):
            layer = built(arch, layout, config, number).eval()
            run_layer(layer, x_BSH, (cos.to("meta"), sin.to("meta")), 1)


def check_layers(
    index: CheckpointIndex, layout: ModelLayout, arch: Architecture, config: Any
) -> None:
    """Every layer's tensors against those of transformers' module.

    Args:
        index, layout: the source.
        arch, config: its classes, and the config made from its text config.
    Raises: SourceError.
    """
    stored = stored_by_layer(index, layout)
    module = arch.layer.__name__
    for number in range(layout.num_layers):
        prefix, mine = f"{layout.layer_prefix}{number}.", stored.get(number, {})
        files = sorted({tensor.file for tensor in mine.values()})
        where = f"{', '.join(files[:MAX_LISTED])}{', ...' if len(files) > MAX_LISTED else ''}"
        state = built(arch, layout, config, number).state_dict()
        wanted = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in state.items()}
        for name, shape in wanted.items():
            if name not in mine:
                raise SourceError(
                    f"{where or 'no file'}: tensor {name}: expected {floats(shape)} by"
                    f" {CONFIG_FILE} ({module}), found none"
                )
            check_tensor(mine[name], shape)
        if extra := sorted(mine.keys() - wanted.keys()):
            tensor = mine[extra[0]]
            raise SourceError(
                f"{tensor.file}: tensor {tensor.name}: expected no such tensor in layer {number} by"
                f" {CONFIG_FILE} ({module} has none), found {tensor.dtype} {list(tensor.shape)}"
            )


def stored_by_layer(
    index: CheckpointIndex, layout: ModelLayout
) -> Mapping[int, Mapping[str, PlainTensor]]:
    """Layer -> name -> tensor, of all that a layer is filled with but its routed experts."""
    family, layers = FAMILIES[layout.family], dict[int, dict[str, PlainTensor]]()
    for entry in index.outside_experts(layout):
        number = entry.name.removeprefix(layout.layer_prefix).partition(".")[0]
        if not entry.name.startswith(layout.layer_prefix) or not number.isdecimal():
            continue
        tensor = as_plain(index, layout, entry)
        if tensor is not None and family.fills_layer(tensor.name):
            layers.setdefault(int(number), {})[tensor.name] = tensor
    return layers


def check_ends(index: CheckpointIndex, layout: ModelLayout, config: Any) -> None:
    """Embedding, last norm and head; that they are there was seen when the layout was read."""
    hidden, vocab = config.hidden_size, config.vocab_size
    for name, shape in (
        (layout.embed_name, (vocab, hidden)),
        (layout.norm_name, (hidden,)),
        (layout.head_name, (vocab, hidden)),
    ):
        tensor = as_plain(index, layout, index.tensors[name])
        assert tensor is not None, "neither is an expert's, nor a scale"
        check_tensor(tensor, shape)


def check_tensor(tensor: PlainTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name}: expected {floats(shape)} by {CONFIG_FILE}, found"
            f" {tensor.dtype} {list(tensor.shape)}"
        )


def floats(shape: tuple[int, ...]) -> str:
    return f"{' or '.join(FLOATS)} {list(shape)}"


def carried_through(index: CheckpointIndex, layout: ModelLayout) -> Mapping[str, list[PlainTensor]]:
    """What goes into the output although the calibration's model has no use for it: part -> its
    tensors. A part is a layer behind the last one, or a name's first piece."""
    parts: dict[str, list[PlainTensor]] = {}
    for tensor, part in unused(index, layout):
        parts.setdefault(part, []).append(tensor)
    return parts


def unused(index: CheckpointIndex, layout: ModelLayout) -> Iterator[tuple[PlainTensor, str]]:
    family, ends = FAMILIES[layout.family], (layout.embed_name, layout.norm_name, layout.head_name)
    for entry in index.outside_experts(layout):
        tensor = as_plain(index, layout, entry)
        if tensor is None or entry.name in ends:
            continue
        rest = entry.name.removeprefix(layout.layer_prefix)
        if not entry.name.startswith(layout.layer_prefix):
            yield tensor, entry.name.removeprefix("model.").partition(".")[0]
        elif not (number := rest.partition(".")[0]).isdecimal() or int(number) >= layout.num_layers:
            yield tensor, f"layer {number}"
        elif family.is_cache_scale(entry.name):
            yield tensor, "key and value cache scales"
        elif not family.fills_layer(entry.name):
            yield tensor, "what the model computes again"
