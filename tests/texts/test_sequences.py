"""From files of texts to packed sequences: what is cut where, what is drawn, and what is
refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from p48ray.checkpoint.index import open_checkpoint
from p48ray.config.documents import DocumentSource
from p48ray.errors import CalibrationError, ConfigError, SourceError
from p48ray.store import LocalStore
from p48ray.texts.documents import digest_documents, read_documents
from p48ray.texts.sequences import (
    digest_tokenizer,
    load_sequences,
    load_tokenizer,
    shares,
)
from p48ray.texts.tally import Tally
from tests.conftest import REPO, TINY
from tests.texts.packed import packed

BOS = 1000


class Letters:
    """A tokenizer of one id a letter, a = 0."""

    def __init__(self, bos_token_id: int | None = BOS) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens, "bos is the packer's business"
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def write(path: Path, *texts: object) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def source(path: Path, weight: float = 1.0) -> DocumentSource:
    return DocumentSource(path=str(path), weight=weight)


def test_documents_are_packed_with_bos_before_each_and_the_rest_is_dropped() -> None:
    rows = packed(["abc", "de", "fghij"], Letters(), 4)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[BOS, 0, 1, 2], [BOS, 3, 4, BOS], [5, 6, 7, 8]]


def test_tokenizer_without_bos_packs_documents_alone() -> None:
    assert packed(["abc", "de"], Letters(None), 2).tolist() == [[0, 1], [2, 3]]


def test_no_text_packs_to_no_rows() -> None:
    assert packed([], Letters(), 4).shape == (0, 4)


def test_documents_are_read_line_by_line_and_empty_ones_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one", "  ", "two\nlines", "")
    path.write_text(path.read_text() + "\n\n" + '{"text": "ünd", "other": 1}')
    assert list(read_documents(source(path), "calibration.documents")) == [
        "one",
        "two\nlines",
        "ünd",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json", r"expected a JSON object, found b'not json'"),
        (b'{"txt": "a"}', r"expected a column 'messages' or 'conversations' or 'text', found txt"),
        (b'["text"]', r"expected a JSON object, found"),
        (b"3", r"expected a JSON object, found"),
        (b'{"text": 3}', "'text': expected a text, found a number"),
        (b'{"text": null}', "'text': expected a text or a chat, found null"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10 of the line\)"),
    ],
)
def test_bad_line_is_refused_by_file_and_number(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(
        CalibrationError, match=rf"calibration\.documents: .*a\.jsonl, line 3: {words}"
    ):
        list(read_documents(source(path), "calibration.documents"))


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1.0], 7, [7]),
        ([0.45, 0.45, 0.1], 20, [9, 9, 2]),
        ([0.45, 0.45, 0.1], 512, [231, 230, 51]),
        ([45, 45, 10], 512, [231, 230, 51]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([1, 1], 1, [1, 0]),
        ([3, 1], 2, [2, 0]),
        ([1e-9, 1], 10, [0, 10]),
    ],
)
def test_shares_add_up_and_follow_the_weights_by_largest_remainder(
    weights: list[float], total: int, expected: list[int]
) -> None:
    assert shares(weights, total) == expected


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_any_mix_add_up_and_are_within_one_of_the_ideal(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(1 + seed % 7, generator=generator) + 0.01).tolist()
    total = int(torch.randint(1, 1000, (), generator=generator))
    found = shares(weights, total)
    assert sum(found) == total
    assert all(
        abs(share - total * weight / sum(weights)) < 1
        for share, weight in zip(found, weights, strict=True)
    )


def mix(tmp_path: Path, seed: int = 0, num_sequences: int = 8) -> torch.Tensor:
    """Sequences of 4 tokens from a source of a's (weight 3) and one of b's (weight 1), every
    document another length."""
    a = write(tmp_path / "a.jsonl", *("a" * n for n in range(1, 30)))
    b = write(tmp_path / "b.jsonl", *("b" * n for n in range(1, 30)))
    return load_sequences(
        [source(a, 3.0), source(b, 1.0)], Letters(), num_sequences, 4, seed, 2000, "calibration"
    )


def test_every_source_of_a_mix_gives_exactly_its_share(tmp_path: Path) -> None:
    rows = mix(tmp_path)
    assert (rows.dtype, rows.shape) == (torch.int32, (8, 4))
    of_b = (rows == 1).any(1)
    assert int(of_b.sum()) == 2
    assert ((rows == 0).any(1) != of_b).all(), "a sequence comes from one source"


@pytest.mark.parametrize("seed", range(3))
def test_draw_says_which_source_every_sequence_is_of(tmp_path: Path, seed: int) -> None:
    letters, weights = "abc", (3.0, 1.0, 2.0)
    mixed = [
        source(write(tmp_path / f"{x}.jsonl", *(x * n for n in range(1, 30))), weight)
        for x, weight in zip(letters, weights, strict=True)
    ]
    origins: list[int] = []
    rows = load_sequences(mixed, Letters(), 12, 4, seed, 2000, "evaluation", origins=origins)
    seen = [next(i for i in row if i != BOS) for row in rows.tolist()]
    assert origins == seen, "a is 0, b is 1, c is 2"
    assert [origins.count(n) for n in range(3)] == [6, 2, 4]
    alone: list[int] = []
    load_sequences(mixed[:1], Letters(), 5, 4, seed, 2000, "evaluation", origins=alone)
    assert alone == [0] * 5


def test_sources_of_a_mix_are_shuffled_together(tmp_path: Path) -> None:
    orders = {tuple((mix(tmp_path, seed) == 1).any(1).tolist()) for seed in range(5)}
    assert len(orders) > 1


def test_draw_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    assert torch.equal(mix(tmp_path, 3), mix(tmp_path, 3))
    assert not torch.equal(mix(tmp_path, 3), mix(tmp_path, 4))


def test_sequences_are_drawn_without_replacement(tmp_path: Path) -> None:
    """Asked for all of them, a draw is a permutation of the packed text."""
    path = write(tmp_path / "a.jsonl", "abcdefghijklmnopqrstuvwxyz" * 3)
    rows = packed(read_documents(source(path), "k"), Letters(), 5)
    drawn = load_sequences([source(path)], Letters(), len(rows), 5, 1, 2000, "calibration")
    assert drawn.tolist() != rows.tolist()
    assert sorted(drawn.tolist()) == sorted(rows.tolist())


def test_too_little_text_is_refused_by_file_with_both_counts(tmp_path: Path) -> None:
    plenty, little = (
        write(tmp_path / "plenty.jsonl", "a" * 1000),
        write(tmp_path / "little.jsonl", "b" * 11),
    )
    with pytest.raises(
        CalibrationError,
        match=(
            r"calibration\.documents: .*little\.jsonl: expected text for 4 sequences of 4 tokens,"
            r" found 3 in 1 documents \(1 rows"
        ),
    ):
        load_sequences([source(plenty), source(little)], Letters(), 8, 4, 0, 2000, "calibration")


def test_id_beyond_the_vocabulary_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "abcdz" * 10)
    load_sequences([source(path)], Letters(None), 10, 5, 0, 26, "evaluation")
    with pytest.raises(
        SourceError, match="evaluation: the tokenizer gave id 25, but the model's vocab_size is 25"
    ):
        load_sequences([source(path)], Letters(None), 10, 5, 0, 25, "evaluation")


def test_digest_covers_bytes_weights_and_order_of_a_mix(tmp_path: Path) -> None:
    a, b, copy = (
        write(tmp_path / name, text) for name, text in (("a", "one"), ("b", "two"), ("copy", "one"))
    )
    base = digest_documents([source(a), source(b)], "k")
    assert digest_documents([source(copy), source(b)], "k") == base
    others = [
        [source(b), source(a)],
        [source(a, 2.0), source(b)],
        [source(a)],
        [source(a), source(b), source(b)],
    ]
    assert len({base, *(digest_documents(other, "k") for other in others)}) == 5
    write(a, "one more")
    assert digest_documents([source(a), source(b)], "k") != base


def test_absent_file_is_refused_by_key_and_path(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.documents: .*nowhere\.jsonl: can not be read: No such file"
    ):
        digest_documents([source(tmp_path / "nowhere.jsonl")], "evaluation.documents")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The small model's folder, its weights by links."""
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    yield tmp_path


def test_tokenizers_digest_covers_its_files_and_code_and_nothing_else(folder: Path) -> None:
    def digest() -> str:
        return digest_tokenizer(open_checkpoint(LocalStore(folder)))

    base = digest()
    (folder / "generation_config.json").write_text("{}")
    (folder / "LICENSE").write_text("other")
    assert digest() == base
    found = {base}
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenization_x.py",
        "tiktoken.model",
    ):
        path = folder / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n")
        found.add(digest())
    assert len(found) == 6


def test_small_models_own_tokenizer_packs_what_its_texts_hold() -> None:
    index = open_checkpoint(LocalStore(TINY))
    tokenizer: Any = load_tokenizer(index, trust_remote_code=False)
    rows = load_sequences([source(TINY / "heldout.jsonl")], tokenizer, 4, 64, 0, 2048, "evaluation")
    assert rows.shape == (4, 64) and int(rows.min()) >= 0
    texts = list(read_documents(source(TINY / "heldout.jsonl"), "k"))
    first = packed(texts[:1], tokenizer, 16)[0]
    assert int(first[0]) == tokenizer.bos_token_id == 0
    assert texts[0].startswith(tokenizer.decode(first[1:].tolist()))


def test_byte_order_marks_of_a_source_are_skipped(folder: Path) -> None:
    """transformers and its tokenizers refuse them."""
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked, plain = (open_checkpoint(LocalStore(place)) for place in (folder, TINY))
    assert (marked.config, marked.tensors) == (plain.config, plain.tensors)
    ids = [
        load_tokenizer(index, trust_remote_code=False)("A few words.")["input_ids"]
        for index in (marked, plain)
    ]
    assert ids[0] == ids[1] and len(ids[0]) > 2


def test_code_of_a_source_folder_runs_only_when_it_is_trusted(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "tokenization_mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('ran')\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    index = open_checkpoint(LocalStore(folder))
    try:
        load_tokenizer(index, trust_remote_code=False)
    except SourceError as error:
        assert "source.trust_remote_code: true" in str(error)
    assert not marker.exists()
    with pytest.raises(SourceError, match="the tokenizer can not be loaded: RuntimeError: ran"):
        load_tokenizer(index, trust_remote_code=True)
    assert marker.exists()


def test_held_out_texts_by_domain_are_what_their_page_says() -> None:
    """As many texts, tokens and sequences; prose and code of the small model's held-out texts, the
    others in none of its files."""
    folder = REPO / "examples" / "held-out"
    tokenizer = load_tokenizer(open_checkpoint(LocalStore(TINY)), trust_remote_code=False)
    rows = re.findall(
        r"^\| `(\w+\.jsonl)` \| .* \| (\d+) \| ([\d,]+) \| (\d+) \|$",
        (folder / "README.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(row[0] for row in rows) == sorted(p.name for p in folder.glob("*.jsonl"))
    held_out = read_texts(TINY / "heldout.jsonl")
    for name, texts, tokens, sequences in rows:
        own, tally = read_texts(folder / name), Tally()
        rows_of_513 = packed(own, tokenizer, 513, tally=tally)
        said = (int(texts), int(tokens.replace(",", "")), int(sequences))
        assert (len(own), tally.tokens, len(rows_of_513)) == said
        assert (set(own) <= set(held_out)) == (name in ("prose.jsonl", "code.jsonl"))
        assert not set(own) & set(read_texts(TINY / "calibration.jsonl"))


def read_texts(path: Path) -> list[str]:
    return list(read_documents(source(path), "evaluation.documents"))
