"""A tokenizer in the form in which some checkpoints ship theirs: Python on top of tiktoken, with
the merge ranks in a file beside it."""

from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer

SPECIAL = ("[BOS]", "[EOS]", "<|turn|>")


class RanksTokenizer(PreTrainedTokenizer):
    """Ids 0 to n - 1 are the merge ranks, the special tokens come after them."""

    vocab_files_names = {"vocab_file": "tiktoken.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file, bos_token="[BOS]", eos_token="[EOS]", **settings):
        ranks = load_tiktoken_bpe(str(Path(vocab_file)))
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding(
            "ranks", pat_str=r"\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens=special
        )
        self.special = special
        super().__init__(bos_token=bos_token, eos_token=eos_token, **settings)

    @property
    def vocab_size(self):
        return self.encoding.n_vocab

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text, **_):
        return [
            self._convert_id_to_token(i) for i in self.encoding.encode(text, allowed_special="all")
        ]

    def _convert_token_to_id(self, token):
        return (
            self.special[token]
            if token in self.special
            else self.encoding.encode_single_token(token.encode("latin-1"))
        )

    def _convert_id_to_token(self, index):
        names = {i: name for name, i in self.special.items()}
        return (
            names[index]
            if index in names
            else self.encoding.decode_single_token_bytes(index).decode("latin-1")
        )

    def convert_tokens_to_string(self, tokens):
        return b"".join(t.encode("latin-1") for t in tokens).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
