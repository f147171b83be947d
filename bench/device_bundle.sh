#!/usr/bin/env bash
# Wheels for a machine without a network that has PyTorch and transformers, but neither Ray nor the clients of buckets.
#
#   bench/device_bundle.sh OUT_FOLDER
#   there: python3 -m pip install --no-index --no-deps --target DEPS OUT_FOLDER/*.whl
#          PYTHONPATH=DEPS:. python3 bench/job.py ...
#
# Versions are those of constraints.txt. The machine: Linux on x86-64, Python 3.12 (PYTHON_VERSION says another). What it is taken
# to have already: torch, transformers, huggingface_hub, safetensors, numpy, pyarrow, pyyaml, psutil, jaxtyping, attrs, click,
# filelock, msgpack, packaging, protobuf, requests, rich, typer, urllib3, python-dateutil, typing_extensions, prometheus_client.
# Wheels lose what the job never uses (bench/strip_wheel.py). Exit code 1 if the folder is then larger than LIMIT_BYTES.
set -euo pipefail

LIMIT_BYTES=45000000
PACKAGES=(
  ray jsonschema jsonschema-specifications referencing rpds-py  # what `import ray` asks for
  pydantic pydantic_core annotated-types typing-inspection
  boto3 botocore s3transfer jmespath
  compressed-tensors loguru tenacity
)

if [ $# -ne 1 ]; then
  echo "usage: bench/device_bundle.sh OUT_FOLDER" >&2
  exit 2
fi
out=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
version=${PYTHON_VERSION:-3.12}

pins=()
for package in "${PACKAGES[@]}"; do
  if ! pin=$(grep -E "^$package==" "$here/../constraints.txt"); then
    echo "constraints.txt has no pin of $package" >&2
    exit 1
  fi
  pins+=("$pin")
done

whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$whole" \
  --python-version "$version" --implementation cp \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 "${pins[@]}"
mkdir -p "$out"
rm -f "$out"/*.whl
"$python" "$here/strip_wheel.py" "$whole" "$out"

bytes=$(cat "$out"/*.whl | wc -c)
echo "$out: $bytes bytes in ${#PACKAGES[@]} wheels"
if [ "$bytes" -gt "$LIMIT_BYTES" ]; then
  echo "expected at most $LIMIT_BYTES bytes" >&2
  exit 1
fi
