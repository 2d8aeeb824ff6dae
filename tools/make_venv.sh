#!/bin/sh
# make_venv.sh PYTHON DIRECTORY: a virtual environment with pip, or a clear word on
# what is missing. Debian ships Python without the part that puts pip into one.
set -eu
python=$1 venv=$2

say() {
  echo "make_venv: $*" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  say "Python 3.10 or later is needed, got $("$python" --version 2>&1 || true);" \
    "name another with: make PYTHON=python3.12"

rm -rf "$venv"
if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  "$python" -m venv "$venv"
elif "$python" -m pip --version >/dev/null 2>&1 && "$python" -c 'import venv' 2>/dev/null; then
  "$python" -m venv --without-pip "$venv"
  "$python" -m pip --python "$venv/bin/python" install --quiet pip
else
  say "this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
fi
