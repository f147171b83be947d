#!/usr/bin/env bash
# The small model end to end on this machine, the way a cluster runs it: a started head with a token, `ray job submit`, the job's log, its exit code.
#
#   infra/run_small.sh [RUN_ROOT] [argument of jobs/compress.py ...]
#
#   infra/run_small.sh                                         two to three minutes on 2 cores, into runs/small
#   infra/run_small.sh runs/quick --set compression.refine_steps=0 --set compression.sweeps=1 --set evaluation=null
#
# Exits with the job's own code: 0, 1, or 2 for a mistake in what was supplied; 1 if the job was stopped or Ray did not come up. The run root
# stays, the head and its folder do not. Another Ray on this machine is left alone: all ports are this script's own (PORT, DASHBOARD_PORT and
# so on below), and it never calls `ray stop`, which would end every Ray there is. BIN: the folder of `ray` and `python`, .venv/bin by default
# (`make setup`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BIN=$(cd "${BIN:-.venv/bin}" && pwd) || { echo "no environment: run \`make setup\`, or set BIN" >&2; exit 1; }
PORT=${PORT:-26379}
DASHBOARD_PORT=${DASHBOARD_PORT:-28265}
AGENT_PORT=${AGENT_PORT:-28266}
CLIENT_PORT=${CLIENT_PORT:-28267}
ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
START_TIMEOUT_S=${START_TIMEOUT_S:-90}
RETRY_S=${RETRY_S:-1}

root=$(realpath -m "${1:-runs/small}")      # absolute: a relative one would lie in Ray's temporary copy of the working directory
shift || true

folder=$(mktemp -d /tmp/p48ray-small.XXXXXX)  # short, because names of sockets are limited
export PATH=$BIN:$PATH                        # the job's `python` is the first on the head's PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS

head_pid=""
logs_pid=""
clean_up() {
  trap '' INT TERM
  [[ -z $logs_pid ]] || kill "$logs_pid" 2>/dev/null || true
  if [[ -n $head_pid ]] && kill "$head_pid" 2>/dev/null; then
    for _ in $(seq 50); do                      # with --block, the head ends most of what it started
      kill -0 "$head_pid" 2>/dev/null || break
      sleep 0.2
    done
  fi
  # What is left, above all the driver of a job that was running: only processes of this script have its token in their environment.
  local environ
  for environ in /proc/[0-9]*/environ; do
    if grep -qsF "RAY_AUTH_TOKEN_PATH=$folder/" "$environ"; then
      kill -KILL "$(basename "$(dirname "$environ")")" 2>/dev/null || true
    fi
  done
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

( umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH" )

ray start --head --block --num-cpus=2 --object-store-memory=$((256 << 20)) --temp-dir="$folder/ray" \
  --port="$PORT" --dashboard-port="$DASHBOARD_PORT" --dashboard-agent-listen-port="$AGENT_PORT" --ray-client-server-port="$CLIENT_PORT" \
  > "$folder/head.log" 2>&1 < /dev/null &
head_pid=$!

# The job server answers before it can take jobs: try to submit until it does, or until the head is gone or late.
id=small-$$-$(date +%s)
deadline=$((SECONDS + START_TIMEOUT_S))
until ray job submit --address "$ADDRESS" --submission-id "$id" --no-wait --working-dir . -- \
    python jobs/compress.py --config configs/tiny.yaml --run-root "$root" "$@" > "$folder/submit.log" 2>&1; do
  if ! kill -0 "$head_pid" 2>/dev/null || (( SECONDS > deadline )); then
    echo "the head did not take the job within $START_TIMEOUT_S s; its log and the last try:" >&2
    tail -n 20 "$folder/head.log" "$folder/submit.log" >&2
    exit 1
  fi
  sleep "$RETRY_S"
done

# In the background, because bash would hear a signal only after a command in the foreground.
ray job logs --address "$ADDRESS" --follow "$id" &
logs_pid=$!
wait "$logs_pid" || true

# Not the exit code of `ray job logs`, nor of `ray job submit`, which turns every failure into 1 and a stopped job into 0: what Ray says of the job.
python - "$ADDRESS" "$id" <<'PYTHON'
import sys
import time

from ray.job_submission import JobStatus, JobSubmissionClient

client = JobSubmissionClient(sys.argv[1])
while not (info := client.get_job_info(sys.argv[2])).status.is_terminal():
    time.sleep(0.5)
print(f"job {sys.argv[2]}: {info.status.value}, exit code {info.driver_exit_code}")
sys.exit(0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 1)
PYTHON
