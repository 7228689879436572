#!/usr/bin/env bash
# The tests on a fresh machine: sets up .venv, then lint, format, import contracts, types, and pytest without those
# tests that are marked slow. Arguments are passed to pytest: ./launch/test.sh tests/diffusion -k ddim
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
ensure_venv test
if [[ $# -eq 0 ]]; then
  echo "ruff (lint and format)"
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  echo "import-linter"
  .venv/bin/lint-imports
  echo "mypy"
  .venv/bin/mypy diffjax
fi
echo "pytest"
if [[ $# -eq 0 ]]; then
  set -- -m "not slow"
fi
# Each process takes a file at a time: what a file's tests share is made once.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
