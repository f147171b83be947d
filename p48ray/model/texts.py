"""Calibration and held-out texts: read, tokenize, pack into sequences of one length, draw a seeded sample.

Documents are packed as `bos document bos document ...` per source and cut into chunks; a document may span two chunks. Chunks are drawn without
replacement by a seeded permutation, each source giving its share of a weighted mix.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.config import DocumentSource
from p48ray.errors import CalibrationError, ConfigError, SourceError
from p48ray.store.local import LocalStore

TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tiktoken", "chat_template")


def digest_documents(documents: Sequence[DocumentSource], key: str) -> str:
    """SHA-256 over every file's bytes and weight, in the order of the mix: the identity of the texts, wherever they lie."""
    digest = hashlib.sha256()
    for document in documents:
        data = read_file(document.path, key)
        digest.update(f"{document.weight!r} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def digest_tokenizer(index: CheckpointIndex) -> str:
    """SHA-256 over the source's tokenizer files (and the code they may need)."""
    digest = hashlib.sha256()
    for name in sorted(index.sidecars):
        if name.startswith(TOKENIZER_FILES) or name.endswith((".py", ".model", ".tiktoken")):
            data = index.store.get(name)
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def read_file(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path}: can not be read: {error.strerror}") from None


def read_documents(path: str, key: str) -> Iterator[str]:
    """The texts of a .jsonl file, one JSON object with a 'text' a line; empty texts are skipped."""
    for number, line in enumerate(read_file(path, key).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))["text"]
            str(text).encode("utf-8")  # JSON can spell half a surrogate pair (\ud83d alone), which is no text and stops tokenizers
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{key}: {path}, line {number}: not UTF-8 (byte {error.start} of the line)") from None
        except UnicodeEncodeError as error:
            found = f"a lone surrogate at character {error.start}"
            raise CalibrationError(f"{key}: {path}, line {number}: expected a 'text' that is Unicode, found {found}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CalibrationError(f"{key}: {path}, line {number}: expected a JSON object with a 'text', found {line[:60]!r}") from None
        if not isinstance(text, str):
            raise CalibrationError(f"{key}: {path}, line {number}: 'text' should be a string, found {type(text).__name__}")
        if text.strip():
            yield text


def load_tokenizer(index: CheckpointIndex, trust_remote_code: bool) -> Any:
    """The source's own tokenizer through transformers. Code from the folder runs only with trust_remote_code.

    Raises: SourceError with the reason when transformers can not build it.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig  # half a second and 100 MB: only where text is read

    # For a model type that it does not know (Kimi-K2's) transformers fills a bare config with all keys, and fails on them; tokenizers need none.
    blank = {} if index.config.get("model_type") in CONFIG_MAPPING else {"config": PreTrainedConfig()}
    with tokenizer_folder(index) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True, **blank)
        except Exception as error:
            hint = "" if trust_remote_code else "; if it ships its own tokenizer code that you trust, set source.trust_remote_code: true"
            raise SourceError(f"{index.store.uri}: the tokenizer can not be loaded: {type(error).__name__}: {error}{hint}") from error


@contextmanager
def tokenizer_folder(index: CheckpointIndex) -> Iterator[str]:
    """Where the source's small files are on this machine: the source itself, or copies of a bucket's, for as long as they are read."""
    if isinstance(index.store, LocalStore):
        yield index.store.uri
        return
    with TemporaryDirectory(prefix="p48ray-tokenizer-") as folder:
        for name in (CONFIG_FILE, *index.sidecars):
            (Path(folder) / name).write_bytes(index.store.get(name))
        yield folder


def pack(texts: Iterator[str], tokenizer: Any, length: int) -> Tensor:
    """Token ids of all texts, bos before each, cut into rows of `length`; the rest is dropped. Returns (rows, length) int32."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += bos + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length], dtype=torch.int32).reshape(rows, length)


def load_sequences(
    documents: Sequence[DocumentSource], tokenizer: Any, num_sequences: int, length: int, seed: int, vocab_size: int, key: str
) -> Tensor:
    """A seeded sample of packed sequences from a weighted mix.

    Args:    key: dotted configuration key of the section, for messages. vocab_size: ids at or above it are refused.
    Returns: (num_sequences, length) int32.
    Raises:  CalibrationError when a source is empty or holds fewer sequences than its share.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for document, share in zip(documents, shares([d.weight for d in documents], num_sequences), strict=True):
        rows = pack(read_documents(document.path, f"{key}.documents"), tokenizer, length)
        if len(rows) < share:
            raise CalibrationError(
                f"{key}.documents: {document.path}: expected text for {share} sequences of {length} tokens, found {len(rows)}; "
                f"add text or lower {key}.num_sequences"
            )
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
    sequences = torch.cat(drawn)
    if int(sequences.max()) >= vocab_size:
        raise SourceError(f"{key}: the tokenizer gave id {int(sequences.max())}, but the model's vocab_size is {vocab_size}")
    return sequences if len(drawn) == 1 else sequences[torch.randperm(num_sequences, generator=generator)]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights, exactly (largest remainders first, ties to the earlier source)."""
    ideal = [total * w / sum(weights) for w in weights]
    result = [int(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (result[i] - ideal[i], i))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result
