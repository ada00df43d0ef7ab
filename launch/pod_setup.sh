#!/usr/bin/env bash
# Runs on each host of a pod, from the checkout that was unpacked beside an older one: makes an environment and puts the
# checkout in its place. launch.pod setup calls it; argument: the extras to install, as in tpu,data.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

new=$PWD checkout=$HOME/mmx venv=$HOME/mmx.venv
if [ -d "$checkout" ] && [ -x "$venv/bin/python" ] &&
  (cd "$checkout" && "$venv/bin/python" -m mmx.pod.host status 2>/dev/null | grep -q '"running": true'); then
  fail "$(hostname) runs a launcher: stop it before installing"
fi

# TPU VMs come with Python 3.10; uv fetches one that is new enough without touching the system.
newest_python() {
  local name
  for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  python3 -m pip install --user --quiet --disable-pip-version-check uv >&2 ||
    fail "$(hostname) has no Python 3.11 and cannot install one: without external addresses it needs Cloud NAT"
  python3 -m uv python install --quiet 3.12 >&2 || fail "$(hostname): uv could not fetch Python 3.12"
  python3 -m uv python find 3.12
}

python=$(newest_python)
# An editable installation points at the folder's final name. The one before is kept.
rm -rf "$checkout.old"
if [ -d "$checkout" ]; then mv "$checkout" "$checkout.old"; fi
mv "$new" "$checkout"
cd "$checkout"
make_environment "$python" "$venv" "[$1]"
# JAX asks for these pages on v5e and later; they are lost when the host starts again.
pages=/sys/kernel/mm/transparent_hugepage/enabled
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  echo always | sudo -n tee "$pages" >/dev/null || echo "note: $(hostname) keeps $(cat "$pages") in $pages"
fi
# launch.pod counts these lines.
printf '{"host": "%s", "installed": true}\n' "${MMX_HOST_NAME:-$(hostname)}"
