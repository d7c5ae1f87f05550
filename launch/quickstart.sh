#!/usr/bin/env bash
# From a fresh clone to a small Kangaroo that answers questions about videos it has never seen:
#
#   ./launch/quickstart.sh [--workdir=DIR] [--seed=N] [--ablate]
#
# Makes a virtual environment where none is active, installs the package, and runs `kangaroo quickstart`
# with the arguments given. Run it again to go on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/environment.sh

if [[ "${1:-}" == --help ]]; then
  head_of launch/quickstart.sh
  exit 0
fi

enter_environment quickstart,curation
exec kangaroo quickstart "$@"
