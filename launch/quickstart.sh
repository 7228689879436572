#!/usr/bin/env bash
# The main job on a fresh machine: sets up .venv, trains the quickstart's cascade, and makes a sheet of samples.
# Run again, it goes on where it was stopped. Arguments are passed on: ./launch/quickstart.sh --config.steps=500
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
ensure_venv emoji
# Huge pages for the memory that every step takes and gives back: a fifth of the time on CPUs. glibc alone reads this.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
echo "Running: python -m diffjax.main --config=configs/quickstart.py $*"
exec .venv/bin/python -m diffjax.main --config=configs/quickstart.py "$@"
