"""A small tokenizer that is code on top of tiktoken, and the files that ship with it."""

import base64
import json
from pathlib import Path

CODE = Path(__file__).parent / "tokenization_ranks.py"
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


def model_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files with this tokenizer in place of its own."""
    own = {
        name: data
        for name, data in files.items()
        if "token" not in name or name.endswith(".safetensors")
    }
    return own | tokenizer_files()
