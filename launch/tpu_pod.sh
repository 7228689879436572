#!/usr/bin/env bash
# A run on a TPU pod slice, or on several, by a queued resource: requests it, waits for it, sets up every host, runs
# the program on all of them and shows its output until it ends. If the slice is preempted, it is requested again, and
# the run goes on; the same command goes on as well after a lost connection.
#
#   NAME=base ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite CREATE_FLAGS=--spot \
#     PREPARE='sudo mkdir -p /mnt/runs && sudo mount -t nfs 10.0.0.2:/runs /mnt/runs' \
#     launch/tpu_pod.sh --config=configs/quickstart.py --workdir=/mnt/runs/base
#
#   NAME            of the queued resource, and of the slice
#   ZONE, ACCELERATOR, RUNTIME    of the slice
#   SLICES          how many slices; 1 if unset
#   CREATE_FLAGS    for `gcloud compute tpus queued-resources create`, such as --spot or --reserved
#   SSH_FLAGS       for ssh and scp, such as --internal-ip or --tunnel-through-iap
#   PREPARE         a command to run first on every host, such as one that mounts the shared storage of --workdir
#   EXTRAS          extras of diffjax; tpu if unset
#   DELETE          if set, the queued resource is deleted when the program has ended well
#   POLL_SECONDS, MAX_RESTARTS    30 and 100 if unset
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:?is to be the name of the queued resource}" "${ZONE:?is to be its zone, such as us-west4-a}"
: "${ACCELERATOR:?is to be the type of a slice, such as v5litepod-256}"
: "${RUNTIME:?is to be its software version, such as v2-alpha-tpuv5-lite}"
read -ra create_flags <<<"${CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${SSH_FLAGS:-}"

# Without --batch-size=all, hosts beyond the 64th would get the command when the first 64 have finished.
everywhere=(--node=all --worker=all --batch-size=all ${ssh_flags[@]+"${ssh_flags[@]}"})
if ((${SLICES:-1} > 1)); then
  nodes=(--node-count="$SLICES" --node-prefix="$NAME")
else
  nodes=(--node-id="$NAME")
fi

ready=ACTIVE
source launch/tpu.sh
pod() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
state() { describe queued-resources 'value(state.state)'; }
create() {
  pod create "$NAME" "${nodes[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    ${create_flags[@]+"${create_flags[@]}"}
}
remove() { pod delete "$NAME" --force --quiet; }
copy() { pod scp "$1" "$NAME:" "${everywhere[@]}"; }
on_every_host() { pod ssh "$NAME" --command="$1" "${everywhere[@]}"; }

run_to_the_end "$@"
