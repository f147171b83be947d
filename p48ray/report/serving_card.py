"""What the model card says of loading the model: vLLM's command for its size, and the right loader
where transformers is wanted."""

from math import ceil, prod

from p48ray.checkpoint.families import FAMILIES
from p48ray.checkpoint.layout import ModelLayout
from p48ray.report.markdown import fenced
from p48ray.report.plan_table import size
from p48ray.run.output_layout import plan_output
from p48ray.unit.context import StageContext

# which reads no VLLM_USE_FLASHINFER_MOE_FP4 any more; the flags of a family's models are in its
# file
VLLM_VERSION = "0.32"
MOE_BACKEND = "flashinfer_trtllm"  # of its NVFP4 backends the one that it tries first
GPU = "NVIDIA B200"
GPU_BYTES = 180 * 10**9  # of one, by its data sheet
VLLM_SHARE = 0.9  # of a GPU's memory that vLLM takes by default, weights and KV cache together
NODE_GPUS = (1, 2, 4, 8)
SCALE_INPUTS = 16  # share an NVFP4 scale, which is not cut

LOADING = """\
from p48ray.integrations.transformers import load_model

model = load_model("<this repository>")
"""
TRANSFORMERS = (
    "Do not load this with `AutoModelForCausalLM`: transformers (5.23 and 5.24) drops the global"
    " scales of per-expert NVFP4 weights without a word, and the model is wrong. This loads it"
    " correctly, decoded to dense weights, and changes nothing in transformers once that does:\n\n"
    + fenced(LOADING, "python")
)


def dense_bytes(context: StageContext) -> int:
    """Of all tensors in dense storage, the form that servers read."""
    plan = context.plan
    shards = plan_output(
        plan.units, plan.config.output.max_shard_size, context.source, context.layout
    )
    return sum(shard.num_bytes for shard in shards)


def gpus_for(num_bytes: int, layout: ModelLayout) -> tuple[int, int]:
    """(GPUs that share each layer, groups of them that share the layers) for a model's weights: the
    smallest number of a node's GPUs that holds them and divides heads and experts, else the largest
    such number on as many nodes as it takes."""
    heads = layout.text_config.get("num_attention_heads")
    dividing = [
        n
        for n in NODE_GPUS
        if layout.moe_intermediate_size % (n * SCALE_INPUTS) == 0
        and (not isinstance(heads, int) or heads % n == 0)
    ] or [1]
    room = GPU_BYTES * VLLM_SHARE
    fitting = [n for n in dividing if num_bytes <= n * room]
    if fitting:
        return fitting[0], 1
    return dividing[-1], ceil(num_bytes / (dividing[-1] * room))


def serving_flags(family: str, num_gpus: int, is_nvfp4: bool = True) -> list[str]:
    """vLLM's flags for a checkpoint of a family, each with its value. The source, which is not
    NVFP4, is served without a backend for that."""
    backend = [f"--moe-backend {MOE_BACKEND}"] if is_nvfp4 else []
    return [f"--tensor-parallel-size {num_gpus}", *FAMILIES[family].serving_flags, *backend]


def fitting_flags(context: StageContext, is_nvfp4: bool = True) -> list[str]:
    """vLLM's flags for the run's checkpoint on as few GPUs as hold it."""
    num_gpus, num_groups = gpus_for(dense_bytes(context), context.layout)
    first, *others = serving_flags(context.plan.source.family, num_gpus, is_nvfp4)
    nodes = [f"--pipeline-parallel-size {num_groups}"] if num_groups > 1 else []
    return [first, *nodes, *others]


def serving(context: StageContext) -> str:
    """The section on vLLM. What is said of memory follows from the weights' bytes alone."""
    num_bytes = dense_bytes(context)
    count = prod(gpus_for(num_bytes, context.layout))
    left = GPU_BYTES * VLLM_SHARE - num_bytes / count
    newer, older = (
        " \\\n  ".join([f"vllm serve <this repository> {flags[0]}", *flags[1:]])
        for flags in (fitting_flags(context, is_nvfp4) for is_nvfp4 in (True, False))
    )
    gpus = f"{count} GPU{'s' if count > 1 else ''} such as {GPU} ({GPU_BYTES / 1e9:.0f} GB)"
    return (
        "NVFP4 weights and activations want NVIDIA Blackwell GPUs. The weights take"
        f" {size(num_bytes)} in dense storage, which {gpus} can hold. Of the {VLLM_SHARE:.0%} of a"
        f" GPU's memory that vLLM takes by default, {size(int(left))} are left for the KV cache and"
        " all else, which `--max-model-len` lowers. For vLLM"
        f" {VLLM_VERSION}:\n\n{fenced(newer)}\n\nOlder versions that read it want a variable of the"
        " environment in place of `--moe-backend`:\n\n"
        + fenced(f"VLLM_USE_FLASHINFER_MOE_FP4=1 {older}")
        + "\n\nThese commands were not run on such hardware by the job that made this checkpoint."
    )
