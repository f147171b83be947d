"""Calibration and held-out texts: read, tokenize, pack into sequences of one length, draw a seeded
sample.

Documents are packed as `bos document bos document ...` per source, or where the tokenizer has no
bos as `document eos document ...`, and cut into chunks; a document may span several chunks. Chunks
are drawn without replacement by a seeded permutation, each source giving its share of a weighted
mix: from all its chunks, or, of a source that is too large to be read whole (texts.documents), from
the first SPREAD times its share.
"""

import hashlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p48ray.checkpoint.header import json_object, unmarked
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.sidecars import CHAT_TEMPLATES
from p48ray.config.documents import DocumentSource
from p48ray.errors import SourceError
from p48ray.store.base import Store
from p48ray.store.open import scheme_of
from p48ray.texts.documents import open_texts, read_documents, too_little
from p48ray.texts.tally import Tally

SPREAD = 4
"""Of a large source so many times its share is packed before the draw, so that neighbours in the
draw rarely are neighbours in a document."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "tiktoken",
    "chat_template",
    CHAT_TEMPLATES,
)


def digest_tokenizer(index: CheckpointIndex) -> str:
    """SHA-256 over the source's tokenizer files (and the code they may need)."""
    digest = hashlib.sha256()
    for name in sorted(index.sidecars):
        if name.startswith(TOKENIZER_FILES) or name.endswith((".py", ".model", ".tiktoken")):
            data = index.store.get(name)
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def load_tokenizer(index: CheckpointIndex, trust_remote_code: bool) -> Any:
    """The source's own tokenizer through transformers. Code from the folder runs only with
    trust_remote_code.

    Raises: SourceError with the reason when transformers can not build it.
    """
    # half a second and 100 MB: only where text is read
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

    own = own_class(index)
    if own and not trust_remote_code:
        raise SourceError(
            f"{index.store.uri}: the tokenizer can not be loaded: {TOKENIZER_CONFIG} names {own},"
            f" which is code of this checkpoint{hint(None, trust_remote_code)}"
        )
    # Tokenizers need no config. For a model type that it does not know (Kimi-K2's) transformers
    # fills a bare one with all keys, and fails on them; of a model whose tokenizer is code it would
    # run the config's code too.
    is_known = index.config.get("model_type") in CONFIG_MAPPING
    blank = {} if is_known and not own else {"config": PreTrainedConfig()}
    with tokenizer_folder(index) as folder:
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True, **blank
            )
        except Exception as error:
            raise SourceError(
                f"{index.store.uri}: the tokenizer can not be loaded: {type(error).__name__}:"
                f" {error}{hint(error, trust_remote_code)}"
            ) from error


def own_class(index: CheckpointIndex) -> str | None:
    """The tokenizer's class, where only the checkpoint's own code has it.

    transformers would otherwise make do with what it finds: from a file of tiktoken ranks alone it
    builds a tokenizer that cuts words in another way, without special tokens, and says nothing.
    """
    import transformers

    if TOKENIZER_CONFIG not in index.sidecars:
        return None
    settings = json_object(TOKENIZER_CONFIG, index.store.get(TOKENIZER_CONFIG), unique_keys=False)
    name, mapped = settings.get("tokenizer_class"), settings.get("auto_map")
    is_code = bool(mapped) and (not isinstance(mapped, dict) or "AutoTokenizer" in mapped)
    return str(name or mapped) if is_code and not hasattr(transformers, str(name)) else None


def hint(error: Exception | None, trust_remote_code: bool) -> str:
    """What the user may do about a tokenizer that does not load."""
    if not trust_remote_code:
        return (
            "; if it ships its own tokenizer code that you trust, set source.trust_remote_code:"
            " true"
        )
    if isinstance(error, ImportError) and "tiktoken" in str(error):
        return (
            "; its code needs tiktoken, which is not installed here: pip install 'tiktoken>=0.14'"
        )
    return ""


@contextmanager
def tokenizer_folder(index: CheckpointIndex) -> Iterator[str]:
    """Where the source's small files are on this machine: the source itself, or for as long as they
    are read copies: of a bucket's, and where JSON has a byte order mark, which its readers refuse.
    """
    names = (CONFIG_FILE, *index.sidecars)
    if scheme_of(index.store.uri).is_local and not any(
        name.endswith(".json") and starts_with_mark(index.store, name) for name in names
    ):
        yield index.store.uri
        return
    with TemporaryDirectory(prefix="p48ray-tokenizer-") as folder:
        for name in names:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(unmarked(name, index.store.get(name)))
        yield folder


def starts_with_mark(store: Store, name: str) -> bool:
    info = store.head(name)
    size_bytes = min(len(BOM_UTF8), info.size_bytes if info else 0)
    return size_bytes > 0 and store.get_range(name, 0, size_bytes) == BOM_UTF8


def pack_sequences(
    texts: Iterator[str],
    tokenizer: Any,
    length: int,
    most: int | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """Token ids of all texts, bos before each, cut into rows of `length`; the rest is dropped.
    Where the tokenizer has no bos, eos stands between two texts, unless the first ends with it.
    Returns (rows, length) int32.

    Args:
        texts: taken one by one, until there are enough.
        tokenizer: of the source; none of its special tokens but these two are added.
        length: tokens a row.
        most: rows after which no further text is asked for; None takes all texts.
        tally: its tokens are counted.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos_id = None if bos else getattr(tokenizer, "eos_token_id", None)
    between: list[Any] = []
    ids = array("i")
    for text in texts:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(between + bos + own)
        # a template may end with eos and white space after it
        ends_itself = eos_id is None or text.rstrip().endswith(tokenizer.eos_token)
        between = [] if ends_itself else [eos_id]
        if most is not None and len(ids) >= most * length:
            break
    if tally is not None:
        tally.tokens = len(ids)
    rows = len(ids) // length if most is None else min(most, len(ids) // length)
    return torch.from_numpy(np.array(ids[: rows * length], dtype=np.int32)).reshape(rows, length)


def load_sequences(
    documents: Sequence[DocumentSource],
    tokenizer: Any,
    num_sequences: int,
    length: int,
    seed: int,
    vocab_size: int,
    key: str,
    tallies: list[Tally] | None = None,
) -> Tensor:
    """A seeded sample of packed sequences from a weighted mix.

    Args:
        documents: the sources of the mix with their weights.
        tokenizer: of the source.
        num_sequences: of all sources together.
        length: tokens a sequence.
        seed: draws texts, sequences and their order.
        vocab_size: ids at or above it are refused.
        key: dotted configuration key of the section, for messages.
        tallies: gets what was read of each source, in the order of the mix.
    Returns: (num_sequences, length) int32.
    Raises: CalibrationError when a source is empty or holds fewer sequences than its share.
    """
    generator, name = torch.Generator().manual_seed(seed), f"{key}.documents"
    drawn = []
    for document, share in zip(
        documents, shares([d.weight for d in documents], num_sequences), strict=True
    ):
        most = None if open_texts(document, name).is_whole else SPREAD * share
        tally = Tally()
        texts = read_documents(document, name, seed, tokenizer, tally)
        rows = pack_sequences(texts, tokenizer, length, most, tally)
        tally.check(document)
        if len(rows) < share:
            raise too_little(document, name, share, length, len(rows), tally)
        if tallies is not None:
            tallies.append(tally)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
    sequences = torch.cat(drawn)
    if int(sequences.max()) >= vocab_size:
        raise SourceError(
            f"{key}: the tokenizer gave id {int(sequences.max())}, but the model's vocab_size is"
            f" {vocab_size}"
        )
    return (
        sequences
        if len(drawn) == 1
        else sequences[torch.randperm(num_sequences, generator=generator)]
    )


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights, exactly (largest remainders first, ties to the
    earlier source)."""
    ideal = [total * w / sum(weights) for w in weights]
    result = [int(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (result[i] - ideal[i], i))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result
