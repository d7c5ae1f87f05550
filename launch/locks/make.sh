#!/usr/bin/env bash
# Writes the lock files beside it: for a CPU, NVIDIA's GPUs and TPUs, each for Python 3.11 and 3.12, the newest packages
# that setup.py allows. Needs uv and a package registry (two minutes):
#
#   ./launch/locks/make.sh [cpu|cuda|tpu ...]
#
# They are given to pip as constraints: pip install -c launch/locks/cpu-py312.txt -e '.[quickstart,serve,web]'.
# A lock is worth something after it was tried: CONSTRAINTS=FILE ./launch/smoke.sh, and the tests, see docs/install.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/arguments.sh

kinds=()
for word in "$@"; do
  case "$word" in
    --help) head_of launch/locks/make.sh; exit 0 ;;
    cpu | cuda | tpu) kinds+=("$word") ;;
    *) refuse make.sh "'$word' is none of cpu, cuda and tpu; --help says more" ;;
  esac
done
[[ ${#kinds[@]} -gt 0 ]] || kinds=(cpu cuda tpu)
command -v uv >/dev/null || refuse make.sh "uv is not installed: pip install uv"

export UV_CUSTOM_COMPILE_COMMAND=launch/locks/make.sh
for kind in "${kinds[@]}"; do
  extras=(--extra quickstart --extra curation --extra serve --extra web)
  [[ "$kind" == cpu ]] || extras+=(--extra "$kind")
  for version in 3.11 3.12; do
    file="launch/locks/$kind-py${version/./}.txt"
    # libtpu has wheels for this age of Linux and newer. Addresses of registries are not for a file that is shared.
    uv pip compile setup.py --quiet --upgrade "${extras[@]}" --python-version "$version" \
      --python-platform x86_64-manylinux_2_31 --no-annotate --no-emit-index-url --no-emit-find-links \
      --output-file "$file" >/dev/null
    echo "$file: $(grep -c == "$file") packages, $(grep -E '^(jax|av)==' "$file" | tr '\n' ' ')"
  done
done
