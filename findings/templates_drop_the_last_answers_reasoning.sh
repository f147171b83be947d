#!/usr/bin/env bash
# Guess: a chat that ends with an answer keeps that answer's `reasoning_content` under the chat template of a model that reasons; only
# reasoning of earlier turns is dropped.
# Seen (2026-12-01, templates in the source package llama-cpp-python 0.3.36, rendered by jinja2 3.1.6 with transformers' extensions):
# Kimi-K2-Thinking's template counts the last answer as history and writes `<think></think>`; so does DeepSeek-V3.1's; DeepSeek-V3.2's
# and V4's write `</think>` alone. Qwen3's, GLM-4.6's, MiniMax-M2's and Kimi-K3's keep it. No error, no warning: whoever renders finished
# chats for calibration or training with the first four has answers without reasoning.
# Output: a line a template: its name, "kept" or "dropped", and the end of the text. Exit code 0 while that is so, else 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet scikit-build-core==1.1.2 jinja2==3.1.6
# 77 MB; nothing of it is built or run
pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$work" llama-cpp-python==0.3.36
tar --extract --gzip --file "$work"/llama_cpp_python-0.3.36.tar.gz --directory "$work" --strip-components 5 --wildcards '*/models/templates/*.jinja'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

folder = Path(sys.argv[1])
expected = {
    "Kimi-K2-Thinking": "dropped",
    "deepseek-ai-DeepSeek-V3.1": "dropped",
    "deepseek-ai-DeepSeek-V3.2": "dropped",
    "deepseek-ai-DeepSeek-V4": "dropped",
    "Kimi-K3": "kept",
    "Qwen-Qwen3-0.6B": "kept",
    "GLM-4.6": "kept",
    "MiniMax-M2": "kept",
}
chat = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two twos."},
]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
found = {}
for name in expected:
    (path,) = folder.rglob(f"{name}.jinja")
    text = environment.from_string(path.read_text()).render(
        messages=chat, bos_token="", eos_token="", add_generation_prompt=False
    )
    found[name] = "kept" if "Two twos." in text else "dropped"
    print(f"{name}: {found[name]}: ...{text[-60:]!r}")
sys.exit(found != expected)
PYTHON
