"""What the hardware does, measured or assumed: numbers, their units and where they come from."""

from dataclasses import dataclass


class Rate(float):
    """A number with its unit, and where it comes from."""

    unit: str
    where: str

    def __new__(cls, value: float, unit: str, where: str) -> "Rate":
        rate = super().__new__(cls, value)
        rate.unit, rate.where = unit, where
        return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the hardware does: FLOP, bytes or weights a second; `_s`: seconds that a step takes."""

    # The solver: a part that a unit pays whatever it holds, because columns wait for each other,
    # and a part for every weight.
    column_step_s: Rate  # one column of a one-shot pass
    pair_group_step_s: Rate  # one pair_group of a descent sweep, of all rows or of a row group
    # one weight of a one-shot pass or of a one-sided sweep, with its share of what lies between
    # them
    weight_s: Rate
    two_sided_weight_s: Rate  # one weight of a two-sided sweep
    code_step_s: Rate  # a pair_group of code descent, which is torch code
    # expert forwards and gradients in TF32, with all that lies between products in a unit
    matmul_flops: Rate
    moment_flops: Rate  # second moments, counted as whole squares
    factor_flops: Rate  # factors, counted as one cube
    refine_flops: Rate  # refinement
    # Streams
    # until a stream's first write begins, imports and a GPU context included, and what is deleted
    # at its end
    stream_begin_s: Rate
    stream_flops: Rate  # a worker's forwards and gradients through a layer
    decode_weights: Rate  # experts of a checkpoint decoded for the evaluation
    # Bytes: near is a folder of the node's own, far is a store that is read over the node's link
    near_read: Rate  # a node, mapped files
    near_write: Rate  # a node
    near_copy: Rate  # a node, files into a file: reduce
    link: Rate  # a node, each way
    far_copy: Rate  # a node's calls for copies inside a bucket: reduce
    hash_bytes: Rate  # a thread, SHA-256
    # a worker, a unit's own rows picked from mapped parts and brought to the device
    gather_bytes: Rate
    check_bytes: Rate  # a worker, what verification reads, decodes and compares
    # Once
    ray_start_s: Rate
    # imports, the source's headers, a GPU context, what is left of compiling kernels
    worker_start_s: Rate
    gpus_a_node: Rate  # GPUs that share a link


H200 = "one H200, bench/job.py, docs/PERFORMANCE.md"
DISK = (
    "a virtual disk beside one H200, fsync included, bench/job.py, docs/PERFORMANCE.md: yours may"
    " be faster"
)
H100 = "one H100 80GB, 8 experts a unit, docs/PERFORMANCE.md"
ASSUMED = "assumed, to be measured on a node of H200s"

H200_NODE = Rates(
    column_step_s=Rate(1.2e-6, "s", H100),
    pair_group_step_s=Rate(3.5e-6, "s", H100),
    weight_s=Rate(1.0e-10, "s", H100),
    two_sided_weight_s=Rate(2.3e-10, "s", H100),
    code_step_s=Rate(
        1.6e-3, "s", "five descent steps of that kind, by count of kernels: not measured"
    ),
    matmul_flops=Rate(1.75e14, "FLOP/s", H200),
    moment_flops=Rate(6.5e14, "FLOP/s", H100),
    factor_flops=Rate(2.8e13, "FLOP/s", H100),
    refine_flops=Rate(1.37e14, "FLOP/s", H200),
    stream_begin_s=Rate(15.0, "s", H200),
    stream_flops=Rate(2.4e14, "FLOP/s", ASSUMED),
    decode_weights=Rate(3.7e9, "weights/s", H200),
    near_read=Rate(4e9, "bytes/s", ASSUMED),
    near_write=Rate(1.2e9, "bytes/s", DISK),
    near_copy=Rate(0.9e9, "bytes/s", DISK),
    link=Rate(2.5e9, "bytes/s", ASSUMED),
    far_copy=Rate(2.5e9, "bytes/s", ASSUMED),
    hash_bytes=Rate(1.3e9, "bytes/s", H200),
    gather_bytes=Rate(7e9, "bytes/s", H200),
    check_bytes=Rate(1.35e9, "bytes/s", H200),
    ray_start_s=Rate(7.0, "s", H200),
    worker_start_s=Rate(13.0, "s", H200),
    gpus_a_node=Rate(8, "GPUs", "assumed"),
)
