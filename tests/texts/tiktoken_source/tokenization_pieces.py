"""A tokenizer in the form of Kimi's: `encode` cuts a text where too many characters of a kind
follow each other, gives the pieces to tiktoken with all special tokens allowed, and `_tokenize`
turns the ids into texts, which transformers turns back into ids."""

from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_RESERVED = 16
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000
PATTERN = "|".join(
    (
        r"\p{Han}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class PiecesTokenizer(PreTrainedTokenizer):
    """Ids 0 to n - 1 are the merge ranks; then come the special tokens, named by
    added_tokens_decoder or else reserved."""

    vocab_files_names = {"vocab_file": "tiktoken.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file,
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        added_tokens_decoder=None,
        **settings,
    ):
        ranks = load_tiktoken_bpe(str(vocab_file))
        names = {i: token.content for i, token in (added_tokens_decoder or {}).items()}
        special = {
            names.get(i, f"<|reserved_{i}|>"): i
            for i in range(len(ranks), len(ranks) + NUM_RESERVED)
        }
        self.model = tiktoken.Encoding(
            Path(vocab_file).name,
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        self.unk_id = special[str(unk_token)]
        shown = bytes_to_unicode()
        self.bytes_of = {letter: byte for byte, letter in shown.items()}
        self.decoder = {
            i: "".join(shown[b] for b in self.model.decode_single_token_bytes(i))
            for i in range(self.model.n_vocab)
        }
        self.encoder = {token: i for i, token in self.decoder.items()}
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            added_tokens_decoder=added_tokens_decoder,
            **settings,
        )

    def encode(self, text, allow_special_tokens=True, **settings):
        if settings:
            return super().encode(text, **settings)
        ids = []
        for start in range(0, len(text), MAX_CHARACTERS):
            for piece in self.pieces(text[start : start + MAX_CHARACTERS]):
                if allow_special_tokens:
                    ids.extend(self.model.encode(piece, allowed_special="all"))
                else:
                    ids.extend(self.model.encode(piece, disallowed_special=()))
        return ids

    @staticmethod
    def pieces(text):
        """Cut where more than MAX_RUN characters, all white space or none of it, follow."""
        count, start = 0, 0
        was_space = text[0].isspace() if text else False
        for i in range(len(text)):
            is_space = text[i].isspace()
            if was_space ^ is_space:
                count, was_space = 1, is_space
            else:
                count += 1
                if count > MAX_RUN:
                    yield text[start:i]
                    start, count = i, 1
        yield text[start:]

    @property
    def vocab_size(self):
        return self.model.n_vocab

    def get_vocab(self):
        return self.encoder

    def _tokenize(self, text, **_):
        return [self.decoder[i] for i in self.encode(text)]

    def _convert_token_to_id(self, token):
        return self.encoder.get(token, self.unk_id)

    def _convert_id_to_token(self, index):
        return self.decoder.get(index)

    def convert_tokens_to_string(self, tokens):
        data = bytearray(self.bytes_of[letter] for letter in "".join(tokens))
        return data.decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
