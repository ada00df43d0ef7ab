#!/usr/bin/env bash
# From a bare Python to a trained model: environment, data, training, a sample and a picture.
#
#   bash launch/quickstart.sh                              the whole thing, under ten minutes on two CPU cores
#   bash launch/quickstart.sh --config.train.steps=800     again with more steps: goes on from the checkpoint
#
# PYTHON names another interpreter than python3. Arguments go to launch.pretrain.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

make_environment "${PYTHON:-python3}" .venv ""
python=.venv/bin/python
workdir=runs/quickstart

# Large pages for large arrays: a step is a quarter faster on a Linux CPU (BUILD_NOTES.md); others ignore it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

echo "== preparing the Python standard library's source code as training data"
"$python" -m launch.prepare --output=data/standard_library --skip_if_exists

echo "== training; progress also goes to $workdir"
"$python" -m launch.pretrain --config=configs/quickstart.py --workdir="$workdir" "$@"

echo "== a sample"
"$python" -m launch.generate --checkpoint="$workdir" --prompt='def main(' --max_new_tokens=80 --temperature=0.7 --top_p=0.9

echo "== the run so far"
"$python" -m launch.report --workdir="$workdir"
