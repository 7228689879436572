#!/usr/bin/env bash
# Several processes on this machine, as on several hosts: they meet at a free port and compute together.
#
#   launch/local.sh NUM -- --config=configs/quickstart.py --workdir=runs/two [--config.key=value ...]
#
# If one process fails, the others are stopped, and the script ends with its exit code. Ctrl-C or SIGTERM is passed
# on once to each: it saves and leaves with code 75, and the same command goes on. A second one ends them at once.
#
#   PYTHON           an interpreter that has diffjax; .venv's, which is made if need be, if unset
#   EXTRAS           extras of diffjax for .venv; emoji if unset
#   DEVICES          CPU devices of each process; 1 if unset
#   MODULE           the module to run; diffjax.main if unset
#   GRACE_SECONDS    how long the others may take to leave after one has failed; 30 if unset
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} == -- ]]; then
  echo "usage: launch/local.sh NUM -- ARGUMENTS; NUM processes of the program, each with ARGUMENTS." >&2
  exit 2
fi
number=$1
interrupted=75 # the program saved and left because of a signal
shift 2
if [[ -z ${PYTHON:-} ]]; then
  source launch/setup.sh
  ensure_venv "${EXTRAS:-emoji}"
  PYTHON=.venv/bin/python
fi

port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$number
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # huge pages, which glibc alone knows of
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

running=()
terminate() {
  local pid
  for pid in ${running[@]+"${running[@]}"}; do
    kill -s TERM "$pid" 2>/dev/null || true
  done
}
finish_off() { # with what they have started
  local pid
  for pid in ${running[@]+"${running[@]}"}; do
    kill -s KILL -- "-$pid" 2>/dev/null || true
  done
}
trap terminate INT TERM HUP
trap finish_off EXIT

# Each in a process group of its own: Ctrl-C reaches this script alone, which passes on a single signal.
set -m
for ((id = 0; id < number; id++)); do
  JAX_PROCESS_ID=$id "$PYTHON" -m "${MODULE:-diffjax.main}" "$@" </dev/null &
  running+=($!)
done

status=0
deadline=
while true; do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((status == 0)); then
      status=$code
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if ((${#left[@]} == 0)); then
    exit "$status"
  fi
  if [[ $status != 0 && -z $deadline ]]; then
    deadline=$((SECONDS + ${GRACE_SECONDS:-30}))
    if ((status != interrupted)); then # otherwise the others have had a signal too
      echo "A process ended with exit code $status: stopping the other ${#left[@]}." >&2
      terminate
    fi
  elif [[ -n $deadline ]] && ((SECONDS >= deadline)); then
    finish_off # one that waits for a process that is gone never comes to look at a signal
  fi
  # Waited for in the background, so that a signal is handled at once.
  sleep 0.2 &
  wait $! || true
done
