"""What the model card says about a form that a checkpoint was converted to: put in there, and taken
out again without a trace."""

import re

from p48ray.checkpoint.modelopt import Form

BEGIN, END = "<!-- p48ray: sparse storage -->\n", "<!-- p48ray: end -->\n\n"
BEGIN_MODELOPT = "<!-- p48ray: modelopt -->\n"
BEFORE = "## Serving\n"
SERVER = "the paired48 patch of vLLM, on SM100 and SM120 GPUs only"
"""What reads sparse storage, in a few words; docs/serving-and-evaluating.md has the rest."""
NOTE = """\
## Sparse storage

These are the same weights in sparse storage, and what this section says takes \
the place of what the others say of keys, sizes, serving and transformers. Per
routed expert linear:

| key | dtype | shape | meaning |
| --- | --- | --- | --- |
| `weight_sparse_packed` | U8 | [out, in/4] | of every 4 bytes of `weight_packed` the 2 \
that are kept, in order |
| `weight_sparse_mask` | U8 | [out, in/16] | 4 bits per 4 bytes, bit i: byte i is kept; \
low nibble is the lower inputs |
| `weight_scale` | F8_E4M3 | [out, in/32] | one scale per 32 inputs |
| `weight_global_scale`, `input_global_scale` | F32 | [1] | as below |

The experts take {after:,} bytes, {ratio:.3f} times their {before:,} in dense storage. \
Neither stock vLLM nor transformers reads this. It was laid out for the
paired48 backend, a patch on vLLM 0.30.0 (27 files: integrations/vllm of \
https://github.com/IST-DASLab/MoESQ), which quantizes activations per
32 inputs. It runs on SM100 (B200, GB200) and SM120 (RTX 5090, RTX PRO 6000) only, not on SM103 \
(B300); on several GPUs with `--tensor-parallel-size N
--enable-expert-parallel`. The job that made this checkpoint did not serve it. `p48ray convert \
<this folder> OUT --storage dense` restores the dense form byte for
byte, `p48ray verify <this folder>` checks this one.

"""


MODELOPT_NOTE = """\
## ModelOpt's layout

These are the same weights in the layout of NVIDIA's ModelOpt, and what this section says takes \
the place of what the others say of keys and of `config.json`. Per routed expert linear:

| key | dtype | shape | meaning |
| --- | --- | --- | --- |
| `weight` | U8 | [out, in/2] | `weight_packed`, byte for byte |
| `weight_scale` | F8_E4M3 | [out, in/16] | as below |
| `weight_scale_2` | F32 | [] | 1 / `weight_global_scale` |
| `input_scale` | F32 | [] | 1 / `input_global_scale` |

A weight is code x `weight_scale` x `weight_scale_2`. What is not quantized is named in \
`hf_quant_config.json` (`exclude_modules`) and in `config.json` (`ignore`). `p48ray convert
<this folder> OUT --format compressed-tensors` restores the other form byte for byte, `p48ray \
verify <this folder>` checks this one.

"""


def convert_card(card: str, to: Form, expert_bytes: tuple[int, int]) -> str:
    """The card with the note of a form before "Serving" (or at its end), or without any.
    expert_bytes: before and after."""
    if to == "dense":
        begin = f"(?:{re.escape(BEGIN)}|{re.escape(BEGIN_MODELOPT)})"
        return re.sub(begin + ".*?" + re.escape(END), "", card, count=1, flags=re.DOTALL)
    before, after = expert_bytes
    if to == "sparse":
        note = BEGIN + NOTE.format(before=before, after=after, ratio=after / max(before, 1)) + END
    else:
        note = BEGIN_MODELOPT + MODELOPT_NOTE + END
    at = card.find(BEFORE)
    return card[:at] + note + card[at:] if at >= 0 else card + note
