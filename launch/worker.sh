#!/usr/bin/env bash
# On each host of a TPU slice, started there by tpu_vm.sh and tpu_pod.sh: makes .venv, runs PREPARE, and runs the
# program apart from the connection. A lost connection takes down neither the program nor its output, run.log; called
# again while the program runs, it only follows it. Ends with the program's exit code, or 255 if that is not known.
#
#   EXTRAS     extras of diffjax; tpu if unset
#   PREPARE    a command to run first, such as one that mounts the shared storage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! { [[ -e run.pid ]] && kill -0 "$(cat run.pid)" 2>/dev/null; }; then
  source launch/setup.sh
  ensure_python
  ensure_venv "${EXTRAS:-tpu}"
  if [[ -n ${PREPARE:-} ]]; then
    bash -euo pipefail -c "$PREPARE"
  fi
  rm -f run.status
  : >run.log # there before it is followed
  # When the machine goes down, the shell in between gets SIGTERM as well, and is to wait for the program.
  # shellcheck disable=SC2016
  setsid nohup bash -c 'trap : TERM; "$@"; echo $? >run.status' worker \
    .venv/bin/python -m "${MODULE:-diffjax.main}" "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
fi
tail --pid="$(cat run.pid)" --lines=+1 --follow run.log
exit "$(cat run.status 2>/dev/null || echo 255)"
