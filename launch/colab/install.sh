#!/usr/bin/env bash
# Installs this clone on a notebook's machine, with the packages that are locked for its accelerator and Python:
#
#   ./launch/colab/install.sh EXTRAS [--dry-run]
#
# EXTRAS are those of setup.py, by commas. --dry-run prints pip's command. launch/colab/*.ipynb call this.
set -euo pipefail
clone="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$clone"
source launch/arguments.sh

extras="" say=()
for word in "$@"; do
  case "$word" in
    --help) head_of launch/colab/install.sh; exit 0 ;;
    --dry-run) say=(echo) ;;
    -*) refuse install.sh "unknown flag $word; --help says what there is" ;;
    *) extras="$word" ;;
  esac
done
[[ "$extras" =~ ^[a-z,-]+$ ]] || refuse install.sh "say which extras, by commas, such as quickstart,web"

kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  kind=cuda
elif compgen -G "/dev/accel[0-9]*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
  kind=tpu
fi
[[ "$kind" == cpu ]] || extras="$extras,$kind"
version="$(python3 -c 'import sys; print("%d%d" % sys.version_info[:2])')"
lock="launch/locks/$kind-py$version.txt"
[[ -f "$lock" ]] || refuse install.sh "no lock for Python $(python3 --version | cut -d' ' -f2): use 3.11 or 3.12"
${say[@]+"${say[@]}"} python3 -m pip install --quiet --disable-pip-version-check -c "$lock" -e "${clone}[$extras]"
