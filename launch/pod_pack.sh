#!/usr/bin/env bash
# Packs the working tree as it is, without what git ignores, into the archive that is named.
set -euo pipefail
cd "$(dirname "$0")/.."
git rev-parse --is-inside-work-tree >/dev/null 2>&1 || {
  echo "ERROR: $PWD is no git checkout: setup ships one" >&2
  exit 1
}

# An index of its own leaves the user's alone.
GIT_INDEX_FILE=$(git rev-parse --git-path index).pod
export GIT_INDEX_FILE
trap 'rm -f "$GIT_INDEX_FILE"' EXIT
git add --all .
git archive --format=tar.gz --output="$1" "$(git write-tree)"
