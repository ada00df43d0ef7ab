#!/usr/bin/env bash
# The miniature context extension, from the quickstart's checkpoint: data, three stages, pictures.
#
#   bash launch/long_context.sh                under twenty minutes on two CPU cores; again: goes on where it stopped
#
# bash launch/quickstart.sh first: it makes the environment and the checkpoint. Arguments go to launch.pretrain.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
start=runs/quickstart
workdir=runs/long_context
for needed in "$python" "$start/checkpoints" "$start/tokenizer.json"; do
  if [ ! -e "$needed" ]; then
    echo "error: $needed is missing: run bash launch/quickstart.sh first" >&2
    exit 1
  fi
done

# As in launch/quickstart.sh.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

echo "== preparing whole packages of the standard library, and questions about what stands far before in them"
"$python" -m launch.prepare --output=data/long_miniature --tokenizer="$start/tokenizer.json" --join=both \
  --long_qa=python --long_qa_lengths=256,16384 --long_qa_tokens=1000000 --skip_if_exists

echo "== extending the context; progress also goes to $workdir"
"$python" -m launch.pretrain --config=configs/long_context.py:miniature --workdir="$workdir" "$@"

echo "== the run so far"
"$python" -m launch.report --workdir="$workdir"
