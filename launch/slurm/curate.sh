#!/usr/bin/env bash
# Curate on CPU nodes under Slurm: a Ray cluster of the job's nodes, one task a core.
#
#   ./launch/slurm/curate.sh --nodes=4 --cpus-per-node=64 [--partition=P] [--account=A] [--time=24:00:00] [--dry-run] \
#       -- --input=/shared/videos --output=/shared/curated
#
# Media and output lie where all nodes see them under the same path. Run it again after a failure: it goes on from
# what is finished. --dry-run prints the job script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

nodes="" cpus="" time=24:00:00 dry_run=0
flags=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --cpus-per-node=*) cpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --partition=* | --account=* | --qos=* | --constraint=* | --reservation=*) flags+=("#SBATCH $1") ;;
    --dry-run) dry_run=1 ;;
    *) echo "slurm/curate.sh: unknown flag $1; the head of the file lists them" >&2; exit 2 ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
if [[ -z "$nodes" || -z "$cpus" || $# -eq 0 ]]; then
  echo "slurm/curate.sh: --nodes=N, --cpus-per-node=C and, after --, the flags of kangaroo curate are needed" >&2
  exit 2
fi
arguments="$(printf '%q ' "$@")"
bin="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}"

script="#!/usr/bin/env bash
#SBATCH --job-name=kangaroo-curate
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --requeue
$(printf '%s\n' "${flags[@]+"${flags[@]}"}")
set -euo pipefail
head=\$(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" | head -n 1)
srun --overlap --nodes=1 --ntasks=1 -w \"\$head\" ${bin}ray start --head --port=6379 --num-cpus=$cpus --block &
sleep 15
if (( SLURM_NNODES > 1 )); then
  srun --overlap --nodes=\$((SLURM_NNODES - 1)) --ntasks=\$((SLURM_NNODES - 1)) --exclude=\"\$head\" \\
    ${bin}ray start --address=\"\$head:6379\" --num-cpus=$cpus --block &
  sleep 15
fi
srun --overlap --nodes=1 --ntasks=1 -w \"\$head\" \\
  ${bin}python -m kangaroo_jax curate --engine=ray --ray_address=\"\$head:6379\" $arguments
"
if (( dry_run )); then
  printf '%s' "$script"
else
  sbatch <<< "$script"
fi
