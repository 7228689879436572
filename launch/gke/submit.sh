#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster: fills in jobset.yaml and submits it. JobSet starts it again after a preemption;
# run again, this script leaves a JobSet that runs as it is, and replaces one that has ended, so that the run goes on.
#
#   NAME=base IMAGE=us-docker.pkg.dev/my/repo/diffjax ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16 CLAIM=runs \
#     launch/gke/submit.sh --config=configs/quickstart.py --workdir=/shared/base
#
#   NAME           of the JobSet
#   IMAGE          the image made with launch/gke/Dockerfile
#   ACCELERATOR    of the node pools: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   TOPOLOGY       of a slice, such as 16x16
#   CHIPS          chips of a host; 4 if unset
#   SLICES         how many slices; 1 if unset
#   CLAIM          a persistent volume claim that all hosts can write (ReadWriteMany); it becomes /shared
#   MAX_RESTARTS   100 if unset
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${NAME:?is to be the name of the JobSet}" "${IMAGE:?is to be the image made with launch/gke/Dockerfile}"
: "${ACCELERATOR:?is to be that of the node pools, such as tpu-v5-lite-podslice}"
: "${TOPOLOGY:?is to be that of a slice, such as 16x16}"
: "${CLAIM:?is to be the name of a persistent volume claim, ReadWriteMany}"
export NAME IMAGE ACCELERATOR TOPOLOGY CLAIM CHIPS=${CHIPS:-4} SLICES=${SLICES:-1} MAX_RESTARTS=${MAX_RESTARTS:-100}
export HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
ARGUMENTS=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
export ARGUMENTS

ended=$(kubectl get jobset "$NAME" --ignore-not-found --output='jsonpath={.status.terminalState}')
if [[ -n $ended ]]; then
  echo "JobSet $NAME has ended ($ended); replacing it."
  kubectl delete jobset "$NAME"
fi
python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ))' <jobset.yaml |
  kubectl apply --filename=-
