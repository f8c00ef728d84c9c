#!/usr/bin/env bash
# Two hosts, here two processes of this machine with two CPU devices each, train LeNet-300-100 at 5% of its weights. Once undisturbed; and
# once with one of them killed on the way, so that the other ends too, and both started again with the same command. The last line says
# whether the end is the same, bit for bit (exit code 1 if not).
#
#   examples/two_hosts.sh [WORKDIR]
#
# Needs the `python` on PATH to be one with sparse_jax[train] installed. Under three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/two_hosts}
if [ -e "$folder" ]; then echo "error: $folder exists: give another folder, or delete it." >&2; exit 2; fi
mkdir -p "$folder"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2

port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start NAME: both processes in the background, their numbers in $pids; what they say goes to NAME.0.log and NAME.1.log
start() {
  local address="127.0.0.1:$(port)"
  pids=()
  for process in 0 1; do
    python launch.py --config=configs/mnist_lenet300.py:offline --workdir="$folder/$1" \
      --config.mesh.data=2 --config.mesh.model=2 --config.mesh.layout=model \
      --config.train.steps=600 --config.checkpoint.every=100 --config.log.every=20 \
      --distributed --coordinator="$address" --num_processes=2 --process_id="$process" --heartbeat_timeout=10 \
      >> "$folder/$1.$process.log" 2>&1 &
    pids+=($!)
  done
}

finish() {
  for pid in "${pids[@]}"; do
    wait "$pid" || { echo "error: a process failed; see $folder/$1.*.log" >&2; tail -n 5 "$folder/$1".*.log >&2; exit 1; }
  done
}

echo 'an undisturbed run ...'
start undisturbed
finish undisturbed

echo 'another one; kill -9 of process 1 once step 300 is in its metrics ...'
start disturbed
until [ -e "$folder/disturbed/metrics.jsonl" ] && grep -q '"step": 300,.*"loss"' "$folder/disturbed/metrics.jsonl"; do
  kill -0 "${pids[0]}" || { echo "error: the run ended before it could be killed; see $folder/disturbed.*.log" >&2; exit 1; }
  sleep 0.02
done
kill -9 "${pids[1]}"
code=0; wait "${pids[0]}" || code=$?
{ wait "${pids[1]}" || true; } 2> /dev/null # bash would tell that it was killed
[ ! -e "$folder/disturbed/result.json" ] || { echo 'error: the run had ended before it was killed' >&2; exit 1; }
echo "process 0 ended by itself, with exit code $code; the same command again ..."
start disturbed
finish disturbed

python - "$folder" <<'PY'
import json, pathlib, sys

from sparse_jax.runtime import records

folder = pathlib.Path(sys.argv[1])
resumed = json.loads((folder / 'disturbed/run.json').read_text())['resumed_at']
assert resumed > 0, 'the second run began anew'


def outcome(name):
    result = records.read(folder / name / 'result.json')  # less the file's checksum, which is of the times too
    (meta,) = (folder / name / 'checkpoints' / str(result['steps']) / 'meta').glob('metadata')
    same = {key: value for key, value in result.items() if 'second' not in key and 'time' not in key}
    return same | {'fingerprint': json.loads(meta.read_text())['fingerprint']}  # of every array, masks and momenta among them


first, second = outcome('undisturbed'), outcome('disturbed')
print(f"test accuracy {first['test_accuracy']:.2%} and {second['test_accuracy']:.2%}, resumed at step {resumed}")
if first != second:
    sys.exit(f"DIFFERENT: {[key for key in first if first[key] != second[key]]}")
print('the disturbed run equals the undisturbed one, bit for bit: parameters, masks, momenta and results')
PY
