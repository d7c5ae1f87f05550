#!/usr/bin/env bash
# Curate on CPU nodes under Slurm: a Ray cluster of the job's nodes, one task a core.
#
#   ./launch/slurm/curate.sh --nodes=4 --cpus-per-node=64 [--partition=P] [--account=A] [--time=24:00:00] [--dry-run] \
#       -- --input=/shared/videos --output=/shared/curated
#
# Media and output lie where all nodes see them under the same path, and so does the home folder: a token lies there
# while the job runs, and Ray (2.52 or newer) answers nobody who does not show it. Run it again after a failure: it goes
# on from what is finished. --dry-run prints the job script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/arguments.sh

nodes="" cpus="" time=24:00:00 dry_run=0
flags=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  check_flag slurm/curate.sh "$1"
  case "$1" in
    --help) head_of launch/slurm/curate.sh; exit 0 ;;
    --nodes=*) nodes="${1#*=}" ;;
    --cpus-per-node=*) cpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --partition=* | --account=* | --qos=* | --constraint=* | --reservation=*) flags+=("#SBATCH $1") ;;
    --dry-run) dry_run=1 ;;
    *) refuse slurm/curate.sh "unknown flag $1; --help lists them" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
if [[ -z "$nodes" || -z "$cpus" || $# -eq 0 ]]; then
  refuse slurm/curate.sh "--nodes=N, --cpus-per-node=C and, after --, the flags of kangaroo curate are needed"
fi
check_numbers slurm/curate.sh nodes cpus
arguments="$(printf '%q ' "$@")"
bin="${VIRTUAL_ENV:+$(printf '%q' "$VIRTUAL_ENV")/bin/}"

script="#!/usr/bin/env bash
#SBATCH --job-name=kangaroo-curate
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --requeue
$(printf '%s\n' "${flags[@]+"${flags[@]}"}")
set -euo pipefail
# Ray runs what it is sent, and listens on all of a node's addresses: the nodes of this job know a token, nobody else.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
RAY_AUTH_TOKEN_PATH=\$(mktemp \"\$HOME/.kangaroo-ray-XXXXXXXXXX\")
trap 'rm -f \"\$RAY_AUTH_TOKEN_PATH\"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >\"\$RAY_AUTH_TOKEN_PATH\"
unset RAY_AUTH_TOKEN # which would go before the file
${bin}python -c 'import sys; from importlib.metadata import version; v = version(\"ray\")
sys.exit(tuple(map(int, v.split(\".\")[:2])) < (2, 52) and f\"kangaroo: Ray {v} ignores tokens: install 2.52 or newer\")'
port=\$((20000 + SLURM_JOB_ID % 10000)) # beside the Ray of another's job on the same node
head=\$(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" | sed -n 1p) # sed reads it all; head would end scontrol by SIGPIPE
srun --overlap --nodes=1 --ntasks=1 -w \"\$head\" \\
  ${bin}ray start --head --port=\"\$port\" --include-dashboard=false --num-cpus=$cpus --block &
sleep 15
if (( SLURM_NNODES > 1 )); then
  srun --overlap --nodes=\$((SLURM_NNODES - 1)) --ntasks=\$((SLURM_NNODES - 1)) --exclude=\"\$head\" \\
    ${bin}ray start --address=\"\$head:\$port\" --num-cpus=$cpus --block &
  sleep 15
fi
srun --overlap --nodes=1 --ntasks=1 -w \"\$head\" \\
  ${bin}python -m kangaroo_jax curate --engine=ray --ray-address=\"\$head:\$port\" $arguments
"
if (( dry_run )); then
  printf '%s' "$script"
else
  sbatch <<< "$script"
fi
