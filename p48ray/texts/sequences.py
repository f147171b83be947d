"""Calibration and held-out texts: the source's tokenizer, and a seeded sample of sequences of one
length from a weighted mix.

Documents are packed as `bos document bos document ...` per source, or where the tokenizer has no
bos as `document eos document ...`, and cut into chunks; a document may span several chunks. Chunks
are drawn without replacement by a seeded permutation, each source giving its share of a weighted
mix: from all its chunks, or, of a source that is too large to be read whole (texts.documents), from
the first SPREAD times its share.
"""

import hashlib
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from p48ray.texts.packing import PackingProgress, packer_of
from p48ray.texts.tally import Tally
from p48ray.texts.tokenizing import Encoder, with_encoder

SPREAD = 4
"""Of a large source so many times its share is packed before the draw, so that neighbours in the
draw rarely are neighbours in a document."""
SOURCES_AT_ONCE = 4
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


def load_sequences(
    documents: Sequence[DocumentSource],
    tokenizer: Any,
    num_sequences: int,
    length: int,
    seed: int,
    vocab_size: int,
    key: str,
    tallies: list[Tally] | None = None,
    origins: list[int] | None = None,
) -> Tensor:
    """A seeded sample of packed sequences from a weighted mix. Several sources are read at once;
    what is drawn, counted and raised is what it is when they are read one after the other.

    Args:
        documents: the sources of the mix with their weights.
        tokenizer: of the source.
        num_sequences: of all sources together.
        length: tokens a sequence.
        seed: draws texts, sequences and their order.
        vocab_size: ids at or above it are refused.
        key: dotted configuration key of the section, for messages.
        tallies: gets what was read of each source, in the order of the mix.
        origins: gets for every sequence the place of its source in the mix.
    Returns: (num_sequences, length) int32.
    Raises: CalibrationError when a source is empty or holds fewer sequences than its share.
    """
    wanted = shares([d.weight for d in documents], num_sequences)

    def draw(encoder: Encoder) -> tuple[list[Tensor], list[Tally], torch.Generator]:
        generator, drawn, counted = torch.Generator().manual_seed(seed), [], []
        for share, (rows, tally) in zip(
            wanted, packed_sources(documents, wanted, encoder, length, seed, key), strict=True
        ):
            drawn.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
            counted.append(tally)
        return drawn, counted, generator

    drawn, counted, generator = with_encoder(tokenizer, draw)
    if tallies is not None:
        tallies.extend(counted)
    sequences = torch.cat(drawn)
    if int(sequences.max()) >= vocab_size:
        raise SourceError(
            f"{key}: the tokenizer gave id {int(sequences.max())}, but the model's vocab_size is"
            f" {vocab_size}"
        )
    places = torch.arange(len(drawn)).repeat_interleave(torch.tensor([len(d) for d in drawn]))
    if len(drawn) > 1:
        order = torch.randperm(num_sequences, generator=generator)
        sequences, places = sequences[order], places[order]
    if origins is not None:
        origins.extend(places.tolist())
    return sequences


def packed_sources(
    documents: Sequence[DocumentSource],
    wanted: Sequence[int],
    encoder: Encoder,
    length: int,
    seed: int,
    key: str,
) -> Iterator[tuple[Tensor, Tally]]:
    """(rows, what was read) of every source, in the order of the mix; SOURCES_AT_ONCE are read at a
    time.

    Args:
        documents: the sources.
        wanted: sequences of each.
        encoder: of the source's tokenizer.
        length, seed, key: as load_sequences takes them.
    Raises: the error of the first source in the mix that has one.
    """
    name = f"{key}.documents"

    def pack(document: DocumentSource, share: int) -> tuple[Tensor, Tally]:
        packer.check()
        most = None if open_texts(document, name).is_whole else SPREAD * share
        tally = Tally()
        texts = read_documents(document, name, seed, encoder.tokenizer, tally)
        progress = PackingProgress(f"{name}: {document.path}", (most or share) * length)
        rows = packer.pack(texts, length, most, tally, progress)
        tally.check(document)
        if len(rows) < share:
            raise too_little(document, name, share, length, len(rows), tally)
        return rows, tally

    readers = ThreadPoolExecutor(min(len(documents), SOURCES_AT_ONCE), thread_name_prefix="texts")
    with packer_of(encoder) as packer:
        futures = deque(
            readers.submit(pack, document, share)
            for document, share in zip(documents, wanted, strict=True)
        )
        try:
            while futures:
                yield futures.popleft().result()
        finally:
            packer.stopped.set()
            readers.shutdown(cancel_futures=True)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights, exactly (largest remainders first, ties to the
    earlier source)."""
    ideal = [total * w / sum(weights) for w in weights]
    result = [int(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (result[i] - ideal[i], i))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result
