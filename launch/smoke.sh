#!/usr/bin/env bash
# Does this clone work with a Python, and with the packages of today? Installs it in a folder of its own and lets
# `kangaroo doctor` decode a video, train on it and ask the model about it (two minutes, most of them pip's):
#
#   [PYTHON=python3.12] [CONSTRAINTS=FILE] ./launch/smoke.sh
#
# CONSTRAINTS names a file of pip's that holds packages to other versions than the newest. What is made is removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

case "${1:-}" in
  --help) head_of launch/smoke.sh; exit 0 ;;
  ?*) refuse smoke.sh "unknown flag $1; --help says what there is" ;;
esac
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  refuse smoke.sh "$("$python" --version 2>&1) is too old: name Python 3.11 or newer in PYTHON"
clone="$PWD" folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH VIRTUAL_ENV
export PATH JAX_PLATFORMS=cpu PIP_DISABLE_PIP_VERSION_CHECK=1

echo "smoke: $("$python" --version): installing"
"$python" -m venv "$folder/venv"
PATH="$folder/venv/bin:$PATH"
constraints=()
if [[ -n "${CONSTRAINTS:-}" ]]; then constraints=(-c "$CONSTRAINTS"); fi
pip install --quiet ${constraints[@]+"${constraints[@]}"} "$clone"
echo "smoke: with $(pip freeze | grep -iE '^(jax|flax|orbax-checkpoint|grain|av|numpy|pillow)==' | tr '\n' ' ')"

cd "$folder" # what was installed is tried, and not the clone
kangaroo doctor
echo "smoke: $("$python" --version) works"
