"""The name of every object in a run root. The layout is public: operators read it, tests assert it,
it is the only state. A blob (.arrow) is done when its manifest (.json) is there, which holds its
digest.

store.json
    what the bucket was seen to be able to do (buckets only)
plan.json
    written first of what belongs to the run
source/
    copy of a hf:// source; mirror/config.json.json once a file is there and was held against its
    digest
calibration/tokens.arrow (+ .json)
    packed token ids of the calibration sequences
scan/model-00001-of-00064.json
    what a file of the source holds that is not finite, outside the compressed experts
residuals/layer-007/part-0003.arrow (+ .json)
    what enters layer 7
compressed-residuals/layer-007/part-0003.arrow (+ .json)
    the same where the layers below are the compressed ones (calibration.propagate)
activations/layer-007/part-0003.arrow (+ .json)
    what its experts see; scales.json once the layer is complete
gradients/layer-007/part-0003.arrow (+ .json)
    the loss's gradient at its routed output, rows as in activations
residual-gradients/layer-007/part-0003.arrow (+ .json)
    the gradient with respect to what enters layer 7, for resume
scratch/3f9a1c2077d04e11.json
    a folder in which blobs (.arrow) of this run lie, their manifests apart (run.scratch)
units/L007-E048-055/<attempt>/shard.safetensors
    one attempt's output; units/L007-E048-055/manifest.json names the one that counts
logs/20261130T171854Z-3f9a1c20.log
    what a driver that began then has to say; read by nothing
failures/<stage>/<task>/<attempt>.json
    traceback and input of every failed attempt
checkpoint/
    the Hugging Face folder
verification/model-00001-of-00003.json
    verdict per output shard
evaluation/<digest>/part-0003.json
    sums over held-out sequences; tokens.arrow (+ .json): their packed token ids
greedy/<digest>/part-0003.json
    how far the checkpoint follows its source's greedy continuations of some prompts
greedy/continuations/<digest>.json
    those continuations, as far as they are, written anew after each pass over the source
benchmarks/<digest>/result.json
    a task's figure for one checkpoint, beside the harness's own harness.json; table.json: what is
    shown
report/report.json, report/report.html
publish/<digest>/model-00001-of-00003.json
    a shard that the Hub has; digest of endpoint, repository and branch
"""

from typing import Literal, get_args

BlobKind = Literal[
    "activations", "gradients", "residuals", "compressed-residuals", "residual-gradients"
]
"""What streams leave, one blob a layer and part. The name is also the folder's."""

STORE = "store.json"
PLAN = "plan.json"
SOURCE = "source/"
MIRROR = "mirror/"
SCAN = "scan/"
TOKENS = "calibration/tokens.arrow"
ACTIVATIONS = "activations/"
GRADIENTS = "gradients/"
RESIDUALS = "residuals/"
COMPRESSED_RESIDUALS = "compressed-residuals/"
RESIDUAL_GRADIENTS = "residual-gradients/"
SCRATCH = "scratch/"
UNITS = "units/"
FAILURES = "failures/"
LOGS = "logs/"
CHECKPOINT = "checkpoint/"
VERIFICATION = "verification/"
EVALUATION = "evaluation/"
GREEDY = "greedy/"
CONTINUATIONS = "greedy/continuations/"
BENCHMARKS = "benchmarks/"
BENCHMARK_TABLE = "benchmarks/table.json"
REPORT_FOLDER = "report/"
REPORT = "report/report.json"
REPORT_PAGE = "report/report.html"
BASELINE = "baseline/"  # run root of the one-shot reference (evaluation.baseline)
PUBLISH = "publish/"
PREFIXES = (
    SOURCE,
    MIRROR,
    SCAN,
    "calibration/",
    ACTIVATIONS,
    GRADIENTS,
    RESIDUALS,
    COMPRESSED_RESIDUALS,
    RESIDUAL_GRADIENTS,
    SCRATCH,
    UNITS,
    FAILURES,
    LOGS,
    CHECKPOINT,
    VERIFICATION,
    EVALUATION,
    GREEDY,
    BENCHMARKS,
    REPORT_FOLDER,
    BASELINE,
    PUBLISH,
)
"""Of everything but the single objects, which lie at the top."""
SINGLE_OBJECTS = (STORE, PLAN)
BLOB_FOLDERS = tuple(f"{kind}/" for kind in get_args(BlobKind))


def source_file(name: str) -> str:
    return f"{SOURCE}{name}"


def mirror_manifest(name: str) -> str:
    return f"{MIRROR}{name}.json"


def scan_manifest(file: str) -> str:
    return f"{SCAN}{file.removesuffix('.safetensors')}.json"


def activation_folder(layer: int) -> str:
    return f"{ACTIVATIONS}layer-{layer:03d}/"


def gradient_folder(layer: int) -> str:
    return f"{GRADIENTS}layer-{layer:03d}/"


def unit_prefix(layer: int) -> str:
    """Prefix of all units of a layer."""
    return f"{UNITS}L{layer:03d}-"


def blob(kind: BlobKind, layer: int, part: int) -> str:
    return f"{kind}/layer-{layer:03d}/part-{part:04d}.arrow"


def is_blob(key: str) -> bool:
    """Whether an object is what a stream leaves: all that run.scratch takes."""
    return key.startswith(BLOB_FOLDERS) and key.endswith(".arrow")


def scratch_record(scratch_id: str) -> str:
    return f"{SCRATCH}{scratch_id}.json"


def blob_manifest(kind: BlobKind, layer: int, part: int) -> str:
    return manifest_of(blob(kind, layer, part))


def manifest_of(blob_key: str) -> str:
    """The manifest beside a blob, which comes last when it is made and goes first when it is
    deleted."""
    return f"{blob_key.removesuffix('.arrow')}.json"


def data_of(manifest_key: str) -> str:
    """The blob beside a manifest."""
    return f"{manifest_key.removesuffix('.json')}.arrow"


def activation_part(layer: int, part: int) -> str:
    return blob("activations", layer, part)


def activation_manifest(layer: int, part: int) -> str:
    return blob_manifest("activations", layer, part)


def gradient_part(layer: int, part: int) -> str:
    return blob("gradients", layer, part)


def gradient_manifest(layer: int, part: int) -> str:
    return blob_manifest("gradients", layer, part)


def layer_scales(layer: int) -> str:
    return f"{ACTIVATIONS}layer-{layer:03d}/scales.json"


def unit_shard(unit_id: str, attempt: str) -> str:
    return f"{UNITS}{unit_id}/{attempt}/shard.safetensors"


def unit_manifest(unit_id: str) -> str:
    return f"{UNITS}{unit_id}/manifest.json"


def failure(stage: str, task_id: str, attempt: str) -> str:
    return f"{FAILURES}{stage}/{task_id}/{attempt}.json"


def driver_log(name: str) -> str:
    return f"{LOGS}{name}.log"


def checkpoint_file(name: str) -> str:
    return f"{CHECKPOINT}{name}"


def shard_verdict(shard: str) -> str:
    return f"{VERIFICATION}{shard.removesuffix('.safetensors')}.json"


def evaluation_tokens(digest: str) -> str:
    return f"{EVALUATION}{digest}/tokens.arrow"


def evaluation_part(digest: str, part: int) -> str:
    return f"{EVALUATION}{digest}/part-{part:04d}.json"


def greedy_part(digest: str, part: int) -> str:
    return f"{GREEDY}{digest}/part-{part:04d}.json"


def continuations(digest: str) -> str:
    return f"{CONTINUATIONS}{digest}.json"


def benchmark_result(digest: str) -> str:
    return f"{BENCHMARKS}{digest}/result.json"


def harness_output(digest: str) -> str:
    return f"{BENCHMARKS}{digest}/harness.json"


def published_shard(digest: str, shard: str) -> str:
    return f"{PUBLISH}{digest}/{shard.removesuffix('.safetensors')}.json"
