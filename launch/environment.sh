# Sourced by the set-up commands: makes a virtual environment, installs mmx into it and checks what that needs.
#
#   make_environment PYTHON FOLDER EXTRAS   a ready environment in FOLDER; installs only what changed
#
# Every failure is one sentence on stderr and a status of 1.

fail() {
  echo "error: $*" >&2
  exit 1
}

check_python() {
  command -v "$1" >/dev/null 2>&1 || fail "no $1 on PATH: install Python 3.11 or newer"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$1 is $("$1" -c 'import platform; print(platform.python_version())'): mmx needs Python 3.11 or newer"
  "$1" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$1 has no venv or pip: install them (on Debian and Ubuntu: apt install python3-venv)"
}

check_disk() { # folder, MiB needed
  local free
  free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge "$2" ] || fail "only $free MiB free on the disk of $1: $2 MiB are needed"
}

make_environment() {
  local python=$1 folder=$2 extras=$3 stamp
  check_python "$python"
  # Installed anew only if the requirements, the extras or the interpreter changed.
  stamp=$({ cat setup.py; echo "$extras"; "$python" --version; } | cksum)
  if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/mmx-installed" 2>/dev/null)" = "$stamp" ]; then
    echo "== environment $folder is ready"
    return
  fi
  check_disk . 3000
  echo "== making the environment $folder with $("$python" --version) (one to four minutes)"
  "$python" -m venv "$folder" || fail "could not make a virtual environment in $folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off -e ".$extras" ||
    fail "installation failed; pip's message above says why (no network, or a full disk?)"
  echo "$stamp" >"$folder/mmx-installed"
  echo "== installed $("$folder/bin/python" -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)')"
}
