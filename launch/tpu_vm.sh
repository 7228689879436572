#!/usr/bin/env bash
# A run on one TPU VM: creates it, sets it up, runs the program there and shows its output until it ends.
# A VM that was preempted is replaced, and the run goes on; the same command goes on as well after a lost connection.
#
#   NAME=sr ZONE=us-west4-a ACCELERATOR=v5litepod-8 RUNTIME=v2-alpha-tpuv5-lite \
#     launch/tpu_vm.sh --config=configs/quickstart.py --workdir=/mnt/runs/quickstart
#
#   NAME, ZONE, ACCELERATOR, RUNTIME    of the VM
#   CREATE_FLAGS    for `gcloud compute tpus tpu-vm create`, such as "--spot --internal-ips"
#   SSH_FLAGS       for ssh and scp, such as --internal-ip
#   PREPARE         a command to run there first, such as one that mounts the storage of --workdir
#   EXTRAS          extras of diffjax; tpu if unset
#   DELETE          if set, the VM is deleted when the program has ended well
#   POLL_SECONDS, MAX_RESTARTS    30 and 100 if unset
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:?is to be the name of the TPU VM}" "${ZONE:?is to be its zone, such as us-west4-a}"
: "${ACCELERATOR:?is to be its type, such as v5litepod-8}"
: "${RUNTIME:?is to be its software version, such as v2-alpha-tpuv5-lite}"
read -ra create_flags <<<"${CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${SSH_FLAGS:-}"

ready=READY
source launch/tpu.sh
vm() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
state() { describe tpu-vm 'value(state)'; }
create() {
  vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" ${create_flags[@]+"${create_flags[@]}"}
}
remove() { vm delete "$NAME" --quiet; }
copy() { vm scp "$1" "$NAME:" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}; }
on_every_host() { vm ssh "$NAME" --worker=all --command="$1" ${ssh_flags[@]+"${ssh_flags[@]}"}; }

run_to_the_end "$@"
