#!/usr/bin/env bash
# Makes an environment and runs the tests in it.
#
#   bash tests/run.sh            everything
#   bash tests/run.sh --fast     without the slow proofs
#   bash tests/run.sh ARGS...    ARGS go to pytest
#
# PYTHON names another interpreter than python3, VENV another folder for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

python=${PYTHON:-python3}
venv=${VENV:-.venv-test}
make_environment "$python" "$venv" "[dev]"
# The parity tests compare with PyTorch and are skipped without it. It is installed where that means a CPU build.
if ! "$venv/bin/python" -c 'import torch, transformers' 2>/dev/null; then
  pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --progress-bar off)
  plan=$("${pip[@]}" --dry-run --report - torch==2.13.0 2>/dev/null || true)
  if [ -n "$plan" ] && ! grep -q '"name": "nvidia' <<<"$plan"; then
    echo "== installing PyTorch's CPU build and Transformers for the parity tests"
    "${pip[@]}" torch==2.13.0 'transformers>=5.23,<6' safetensors || fail "could not install PyTorch and Transformers"
  else
    echo "== no CPU build of PyTorch for this Python: the parity tests will be skipped"
  fi
fi
# The TPU kernels are compiled without a TPU by libtpu, and those tests are skipped without it.
if ! "$venv/bin/python" -c 'import libtpu' 2>/dev/null; then
  echo "== installing libtpu for the tests that compile TPU kernels"
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check install --progress-bar off -e '.[tpu]' ||
    echo "== no libtpu for this machine: the tests that compile TPU kernels will be skipped"
fi

arguments=()
for argument in "$@"; do
  if [ "$argument" = --fast ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
echo "== running the tests on two workers"
exec "$venv/bin/python" -m pytest -n 2 "${arguments[@]}"
