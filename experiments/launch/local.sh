#!/bin/bash
# Trains with several processes on the CPU of this machine, whose coordinator others cannot reach; when one fails, all end.
# Edit: nothing. On N GPUs, one for each process: JAX_PLATFORMS=cuda experiments/launch/local.sh N ...
# Start: experiments/launch/local.sh 2 --steps 200
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES [options of experiments/pretrain.py]" >&2
  exit 2
fi
processes=$1
shift
python=${PYTHON:-.venv/bin/python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

children=() signals=0 seen=0
stop() { kill -"$1" "${children[@]}" 2>/dev/null || true; }
trap '((++signals > 1)) && exit 130; stop TERM' INT TERM # the second time it kills them
trap 'stop KILL' EXIT

for ((process = 0; process < processes; process++)); do
  JAX_LOCAL_DEVICE_IDS=$process "$python" experiments/pretrain.py "$@" \
    --join "127.0.0.1:$port" "$processes" "$process" &
  children+=($!)
done

# The first that fails gives the exit code.
code=0
while ((code == 0)); do
  wait -n || code=$?
  if ((code == 127)); then # none is left
    exit 0
  elif ((code > 128 && signals > seen)); then # a signal ended the waiting, not a process
    seen=$signals code=0
  fi
done
# The others end by themselves, and say why.
for ((tenth = 0; tenth < ${GRACE:-20} * 10; tenth++)); do
  [[ $(jobs -rp) ]] || break
  sleep 0.1
done
exit "$code"
