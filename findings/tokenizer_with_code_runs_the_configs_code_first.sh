#!/usr/bin/env bash
# Guess: AutoTokenizer.from_pretrained(folder, trust_remote_code=True) runs the code that tokenizer_config.json's auto_map names, and
# none of the model's: nothing of a model is loaded.
# Seen (2026-12-01, transformers 5.23.0 from the index, Python 3.11, no torch): the module that config.json's auto_map names is imported
# first, then the tokenizer's. With a config.json that has a model_type and no auto_map, the tokenizer's module alone is imported and
# the tokenizer is the same. So code for a model that has nothing to do with texts can stop a tokenizer, by an import of its own that
# fails or by what it needs.
# Output: "with auto_map: configuration, tokenization", "without: tokenization".
# Exit code 0 while that is so, 1 otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
mkdir "$work/model"
cat > "$work/model/configuration_small.py" <<'PYTHON'
from transformers import PretrainedConfig

print("ran configuration", flush=True)


class SmallConfig(PretrainedConfig):
    model_type = "small_of_this_test"
PYTHON
cat > "$work/model/tokenization_small.py" <<'PYTHON'
from transformers import PreTrainedTokenizer

print("ran tokenization", flush=True)


class SmallTokenizer(PreTrainedTokenizer):
    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 256

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
PYTHON
cat > "$work/model/tokenizer_config.json" <<'JSON'
{"tokenizer_class": "SmallTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_small.SmallTokenizer", null]}}
JSON
cat > "$work/load.py" <<'PYTHON'
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(tokenizer).__name__ == "SmallTokenizer", type(tokenizer)
assert tokenizer("ab")["input_ids"] == [97, 98]
PYTHON
ran() {
  HF_HOME="$work/home-$1" HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/load.py" "$work/model" 2> "$work/log" \
    | sed -n 's/^ran //p' | paste -sd, | sed 's/,/, /g'
}
echo '{"model_type": "small_of_this_test", "auto_map": {"AutoConfig": "configuration_small.SmallConfig"}}' > "$work/model/config.json"
with=$(ran with) || { cat "$work/log"; exit 1; }
echo '{"model_type": "small_of_this_test"}' > "$work/model/config.json"
without=$(ran without) || { cat "$work/log"; exit 1; }
echo "with auto_map: $with"
echo "without: $without"
[ "$with" = "configuration, tokenization" ] && [ "$without" = "tokenization" ]
