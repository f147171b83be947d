#!/usr/bin/env bash
# Guess: PreTrainedConfig.from_dict makes a config of a mapping and leaves the mapping as it is: it copies, so that keyword arguments
# do not reach the caller's mapping.
# Seen (2026-11-30, transformers 5.23.0, Linux): the mappings inside it are not copied. The entry `rope_scaling` in the old form that
# DeepSeek-V3's and Kimi-K2's config.json have ("type") gets `rope_type` and `rope_theta` in the caller's mapping. Who writes that
# mapping out again as config.json has changed the file.
# Output: "before", "after" with the two new keys, "a key at the top: unchanged".
# Exit code 0 while that is so; 1 if the caller's mapping stays as it was.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
"$work/venv/bin/python" - <<'PYTHON'
import copy
import sys

import transformers
from transformers import DeepseekV3Config

release = {
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000,
}
before = copy.deepcopy(release)
DeepseekV3Config.from_dict(release)
print("transformers", transformers.__version__)
print("before", sorted(before["rope_scaling"]))
print("after ", sorted(release["rope_scaling"]))
print("a key at the top:", "unchanged" if release["rope_theta"] == before["rope_theta"] else "changed")
added = release["rope_scaling"].keys() - before["rope_scaling"].keys()
sys.exit(0 if added == {"rope_type", "rope_theta"} else 1)
PYTHON
