"""Time from texts to token ids: transformers' own call text by text, as runs had it before, beside
what runs do now, in turn on the same texts, and compare every id.

    python bench/tokenizing.py                    50 MB, a vocabulary of 40,000 trained for it
    python bench/tokenizing.py --megabytes 2 --vocabulary 2000 --repeats 1
    python bench/tokenizing.py --checkpoint FOLDER          with its tokenizer (its code is run)

Kimi's own files can not come along: the tokenizer is the tests' code of its form (Python around
tiktoken), and a fast one of the same merges stands beside it. Texts are prose and code of the
sample model, code of Python's own library, Chinese words drawn by a seed, and chats of these with
their special tokens: 200 characters to a million.

Wall and CPU seconds (os.times) are of the same calls. On a machine that others use the ratio of CPU
seconds is the surer one; with idle cores wall time gains by the threads too.
"""

import argparse
import base64
import json
import os
import platform
import random
import sys
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.checkpoint.index import open_checkpoint
from p48ray.config.documents import DocumentSource
from p48ray.store.local import LocalStore
from p48ray.texts.packing import packer_of
from p48ray.texts.sequences import load_sequences, load_tokenizer
from p48ray.texts.tokenizing import encoder_of

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "examples" / "tiny-kimi-k2.5"
FORM = REPO / "tests" / "texts" / "tiktoken_source" / "tokenization_pieces.py"
NAMED = (
    *("[BOS]", "[EOS]", "[UNK]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>"),
    *("<|im_middle|>", "<think>", "</think>"),
)
SEQUENCE = 4_096


class Taken(NamedTuple):
    """Seconds of one pass over all texts."""

    wall_s: float
    cpu_s: float


def library_code() -> list[str]:
    """Modules of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [*sorted(root.glob("*.py")), *sorted(root.glob("*/*.py"))]
    return [
        f.read_text(encoding="utf-8", errors="replace")
        for f in files
        if "site-packages" not in f.parts
    ]


def chinese(draw: random.Random, count: int) -> list[str]:
    """Texts of words whose frequencies fall as their rank rises, with few marks between them."""
    letters = [chr(0x4E00 + i) for i in range(3_000)]
    words = [
        "".join(draw.choices(letters, k=draw.choice((1, 2, 2, 2, 3, 4)))) for _ in range(8_000)
    ]
    weights = [1 / (1 + i) for i in range(len(words))]
    marks = ("", "", "", "", "，", "。", "\n")
    return [
        "".join(
            word + draw.choice(marks)
            for word in draw.choices(words, weights, k=draw.choice((30, 200, 1_000)))
        )
        for _ in range(count)
    ]


def corpus(megabytes: float) -> tuple[list[str], list[str]]:
    """Texts for a vocabulary, and those that are timed."""
    draw = random.Random(0)
    lines = (TINY / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    prose = [json.loads(line)["text"] for line in lines]
    code, han = library_code(), chinese(draw, 3_000)

    def chat() -> str:
        turns = []
        for _ in range(draw.choice((1, 1, 3))):
            question = draw.choice(prose)[: draw.choice((100, 500))]
            thought, answer = draw.choice(prose)[:1_000], draw.choice(prose)[:1_000]
            turns.append(
                f"<|im_user|>user<|im_middle|>{question}<|im_end|><|im_assistant|>assistant"
                f"<|im_middle|><think>{thought}</think>{answer}<|im_end|>"
            )
        return "".join(turns)

    texts, num_bytes = [], 0
    while num_bytes < megabytes * 10**6:
        lot = draw.random()
        if lot < 0.35:
            text = draw.choice(prose)
        elif lot < 0.6:
            text = draw.choice(code)[: draw.choice((500, 3_000, 20_000, 10**6))]
        elif lot < 0.75:
            text = draw.choice(han)
        else:
            text = chat()
        texts.append(text)
        num_bytes += len(text.encode())
    return prose + code[:300] + han[:1_000], texts


def train(folder: Path, texts: Sequence[str], size: int) -> Any:
    """A checkpoint's files with a tokenizer of Kimi's form; returns a fast one of the same
    merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names: dict[str, Any] = {}
    exec(compile(FORM.read_text(), str(FORM), "exec"), names)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(names["PATTERN"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    ranks = [
        base64.b64encode(bytes(byte_of[c] for c in token)) + f" {rank}\n".encode()
        for token, rank in tokens
    ]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    settings = {
        "tokenizer_class": "PiecesTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_pieces.PiecesTokenizer", None]},
        "added_tokens_decoder": {
            str(len(tokens) + i): {"content": name, "special": True, **flags}
            for i, name in enumerate(NAMED)
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    }
    for file in TINY.iterdir():
        if "token" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / FORM.name).write_bytes(FORM.read_bytes())
    (folder / "tiktoken.model").write_bytes(b"".join(ranks))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in NAMED])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="[BOS]", eos_token="[EOS]")


def one_by_one(tokenizer: Any, texts: Sequence[str]) -> array:
    """As runs did it before."""
    ids = array("i")
    for text in texts:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend([tokenizer.bos_token_id, *own])
    return ids


def in_batches(tokenizer: Any, texts: Sequence[str]) -> array:
    """As runs do it now, their probes included."""
    with packer_of(encoder_of(tokenizer)) as packer:
        rows = packer.pack(iter(texts), 1)
    return array("i", rows.numpy().tobytes())


def timed(call: Callable[[], Any]) -> tuple[Any, Taken]:
    before, start = os.times(), time.perf_counter()
    found = call()
    after, wall_s = os.times(), time.perf_counter() - start
    cpu_s = after.user + after.system - before.user - before.system
    return found, Taken(wall_s, max(cpu_s, 0.01))  # which is as fine as it is counted


def compare(name: str, tokenizer: Any, texts: Sequence[str], repeats: int) -> bool:
    """Print both ways in turn, and whether all ids are the same."""
    count = sum(map(len, texts))
    before, now = [], []
    are_same = True
    for _ in range(repeats):
        old, taken = timed(lambda: one_by_one(tokenizer, texts))
        before.append(taken)
        new, taken = timed(lambda: in_batches(tokenizer, texts))
        now.append(taken)
        are_same &= old == new
        print(
            f"  {name}: wall {before[-1].wall_s:.1f} then {now[-1].wall_s:.1f} s, CPU"
            f" {before[-1].cpu_s:.1f} then {now[-1].cpu_s:.1f} s, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    encoder = encoder_of(tokenizer)
    print(f"{name}: {type(encoder).__name__}, {encoder.num_threads} threads, {len(old):,} ids,")
    print(f"  {'all the same' if are_same else 'NOT THE SAME'}")
    for label, at in (("wall", 0), ("CPU", 1)):
        b, n = (median(taken[at] for taken in way) for way in (before, now))
        ratio = median(x[at] / y[at] for x, y in zip(before, now, strict=True))
        print(
            f"  {label:4s} {count / b / 1e6:6.2f} then {count / n / 1e6:6.2f} M characters/s,"
            f" {ratio:.1f} times"
        )
    return are_same


def from_files(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> None:
    """Print the rate of the whole way from four files to a draw of sequences."""
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for i in range(4):
            path = Path(folder) / f"{i}.jsonl"
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[i::4]))
            sources.append(DocumentSource(path=str(path)))
        _, taken = timed(
            lambda: load_sequences(sources, tokenizer, 4, SEQUENCE, 0, vocab_size, "calibration")
        )
    count = sum(map(len, texts))
    print(
        f"four files to sequences: {count / taken.wall_s / 1e6:.2f} M characters/s, wall"
        f" {taken.wall_s:.1f} s, CPU {taken.cpu_s:.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--megabytes", type=float, default=50, help="of UTF-8")
    parser.add_argument("--vocabulary", type=int, default=40_000, help="tokens, of the trained one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="whose tokenizer is timed; its code is run")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs")
    training, texts = corpus(arguments.megabytes)
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters")
    with tempfile.TemporaryDirectory() as made:
        fast = None
        if arguments.checkpoint is None:
            fast = train(Path(made), training, arguments.vocabulary)
        store = LocalStore(arguments.checkpoint or Path(made))
        tokenizer = load_tokenizer(open_checkpoint(store), trust_remote_code=True)
    are_same = compare(type(tokenizer).__name__, tokenizer, texts, arguments.repeats)
    from_files(tokenizer, texts, len(tokenizer))
    if fast is not None:
        are_same &= compare("fast, same merges", fast, texts, arguments.repeats)
    return 0 if are_same else 1


if __name__ == "__main__":
    sys.exit(main())
