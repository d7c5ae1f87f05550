#!/usr/bin/env bash
# Lint, format check, types and tests, on the CPU:
#
#   ./launch/test.sh [--slow] [--nightly] [pytest's arguments]
#
# Makes a virtual environment where none is active and installs what is needed. --slow runs the slow tests
# too, as CI does, --nightly those that it runs once a day. Comparisons with PyTorch need KANGAROO_TEST_TORCH=1 (or CI=true), which installs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/environment.sh

if [[ "${1:-}" == --help ]]; then
  head_of launch/test.sh
  exit 0
fi

packages=()
if [[ "${KANGAROO_TEST_TORCH:-}" == 1 || "${CI:-}" == true ]]; then
  packages=(torch==2.13.0 'transformers>=5.24,<5.25' 'peft>=0.21,<0.22') # what the tests were run with
fi
enter_environment dev ${packages[@]+"${packages[@]}"}

status=0 # every check runs, whatever the ones before it say
ruff check . || status=1
ruff format --check . || status=1
mypy || status=1
JAX_PLATFORMS=cpu python -m pytest "$@" || status=1
exit "$status"
