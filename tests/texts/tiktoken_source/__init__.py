"""Two small tokenizers that are code on top of tiktoken, and the files that ship with them."""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CODE = Path(__file__).parent / "tokenization_ranks.py"
PIECES = Path(__file__).parent / "tokenization_pieces.py"
NAMED = (
    *("[BOS]", "[EOS]", "[UNK]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>"),
    *("<|im_middle|>", "<think>", "</think>"),
)
"""Special tokens of the second, which Kimi's names too; six more are reserved."""
MERGES = [b"th", b"he", b"the", b"in", b"an", b"er", b"re", b"on", b"import", b"  ", b"    "]
NUM_RANKS = 256 + len(MERGES)
TEMPLATE = "[BOS]{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}[EOS]{% endfor %}"


def ranks_file() -> bytes:
    """Every byte, then a few merges: "base64 rank" a line, as tiktoken reads it."""
    tokens = [bytes([i]) for i in range(256)] + MERGES
    return b"".join(
        base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)
    )


def tokenizer_files() -> dict[str, bytes]:
    """What lies beside the weights."""
    settings = {
        "tokenizer_class": "RanksTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_ranks.RanksTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "chat_template": TEMPLATE,
    }
    return {
        "tokenization_ranks.py": CODE.read_bytes(),
        "tiktoken.model": ranks_file(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def pieces_files(words: Iterable[str] = (), marks: Mapping[str, Any] = {}) -> dict[str, bytes]:
    """What lies beside the weights of a tokenizer of Kimi's form.

    Args:
        words: merged to one token each, letter by letter.
        marks: lstrip, rstrip or single_word of every added token.
    """
    merges = [*MERGES, *(w.encode()[:n] for w in words for n in range(2, len(w.encode()) + 1))]
    tokens = list(dict.fromkeys([*(bytes([i]) for i in range(256)), *merges]))
    added = {
        str(len(tokens) + i): {
            "content": name,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
            "special": "think" not in name,
            **marks,
        }
        for i, name in enumerate(NAMED)
    }
    settings = {
        "tokenizer_class": "PiecesTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_pieces.PiecesTokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    }
    ranks = (base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens))
    return {
        "tokenization_pieces.py": PIECES.read_bytes(),
        "tiktoken.model": b"".join(ranks),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def model_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files with this tokenizer in place of its own."""
    own = {
        name: data
        for name, data in files.items()
        if "token" not in name or name.endswith(".safetensors")
    }
    return own | tokenizer_files()
