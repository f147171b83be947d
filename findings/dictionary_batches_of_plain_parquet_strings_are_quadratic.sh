#!/usr/bin/env bash
# Guess: a Parquet string column that is stored plain (not dictionary-encoded) can be read with `read_dictionary` in small batches
# in about the time that it takes without, and a batch of 64 rows has a dictionary of at most 64 values.
# Seen (2026-11-30, pyarrow 26.0.0, Linux, 2 cores, Python 3.11): each batch brings the values of all batches before it in its row
# group along in its dictionary, copied anew: the last of 200,000 different rows has 200,000 values for 64 rows (22 MB), and all
# batches together bring 313 million. Time grows with the square of the rows: 50,000 rows take 9 times as long as without
# `read_dictionary`, 100,000 take 29 times, 200,000 take 45 to 80 times (9 to 12 s). The rows that are read are the same. Whoever
# does not know how a column is stored asks for no dictionary where batches are small.
# Output: "rows: equal", "values in the last batch's dictionary: 200000", "time: N times that without", N above 10.
# Exit code 0 while that is so; 1 if the dictionary is not longer than its batch, or the time is within 10 times.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.0
WORK="$work" "$work/venv/bin/python" - <<'PYTHON'
import hashlib
import os
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq

ROWS, BATCH = 200_000, 64
path = os.path.join(os.environ["WORK"], "plain.parquet")
pq.write_table(pa.table({"text": [f"row {i} " + "x" * 100 for i in range(ROWS)]}), path, use_dictionary=False)


def read(**options):
    """Seconds to read all batches, and the last one."""
    begun = time.perf_counter()
    for batch in pq.ParquetFile(path, **options).iter_batches(batch_size=BATCH):
        last = batch
    return time.perf_counter() - begun, last.column(0)


def digest(**options):
    found = hashlib.sha256()
    for i, batch in enumerate(pq.ParquetFile(path, **options).iter_batches(batch_size=BATCH)):
        if i % 100 == 0:
            found.update(repr(batch.column(0).to_pylist()).encode())
    return found.hexdigest()


(plain_s, _), (dictionary_s, last) = read(), read(read_dictionary=["text"])
is_equal = digest() == digest(read_dictionary=["text"])
ratio = dictionary_s / plain_s
print("rows:", "equal" if is_equal else "differ")
print(f"values in the last batch's dictionary: {len(last.dictionary)}, for {len(last)} rows")
print(f"time: {ratio:.0f} times that without ({dictionary_s:.1f} s against {plain_s:.2f} s)")
sys.exit(0 if is_equal and len(last.dictionary) == ROWS and ratio > 10 else 1)
PYTHON
