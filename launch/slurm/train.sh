#!/usr/bin/env bash
# Train on GPU nodes under Slurm: one process a GPU, found by JAX from Slurm's variables.
#
#   ./launch/slurm/train.sh --nodes=4 --gpus-per-node=8 [--partition=P] [--account=A] [--time=24:00:00] \
#       [--dry-run] -- train --config=configs/stage5_long_video.py:kangaroo_8b --workdir=/shared/stage5
#
# The job is requeued where a node dies, and 120 s before its time is up it gets SIGTERM: the training saves and ends
# with code 0, and the job queues itself again until the training is done. --dry-run prints the job script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/arguments.sh

nodes="" gpus=8 time=24:00:00 dry_run=0 cpus=12
flags=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  check_flag slurm/train.sh "$1"
  case "$1" in
    --help) head_of launch/slurm/train.sh; exit 0 ;;
    --nodes=*) nodes="${1#*=}" ;;
    --gpus-per-node=*) gpus="${1#*=}" ;;
    --cpus-per-gpu=*) cpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --partition=* | --account=* | --qos=* | --constraint=* | --reservation=*) flags+=("#SBATCH $1") ;;
    --dry-run) dry_run=1 ;;
    *) refuse slurm/train.sh "unknown flag $1; --help lists them" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
if [[ -z "$nodes" || $# -eq 0 ]]; then
  refuse slurm/train.sh "--nodes=N and, after --, the arguments of kangaroo are needed"
fi
check_numbers slurm/train.sh nodes gpus cpus
arguments="$(printf '%q ' "$@")"
python="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python"

script="#!/usr/bin/env bash
#SBATCH --job-name=kangaroo
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=kangaroo-%j.log
#SBATCH --signal=B:USR1@120
$(printf '%s\n' ${flags[@]+"${flags[@]}"})
cd $(printf '%q' "$PWD")
source launch/restart.sh
export XLA_FLAGS=\"\${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true\"
export RESTARTS=5 # a lost process (code 75) begins again on the same nodes; a lost node requeues the job

ending=0 # the job's time is nearly up: the training saves, and the job queues itself again
trap 'ending=1; scancel --signal=TERM \"\$SLURM_JOB_ID\"' USR1
attempt() {
  local status
  srun --kill-on-bad-exit=1 $(printf '%q' "$python") -m kangaroo_jax $arguments&
  while wait \$!; status=\$?; kill -0 \$! 2>/dev/null; do :; done # a trapped signal ends wait early
  return \"\$status\"
}
restart_until_done attempt
if [[ \$ending == 1 ]]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi"

if [[ $dry_run == 1 ]]; then
  echo "+ sbatch <<JOB"
  echo "$script"
  echo "JOB"
else
  sbatch <<<"$script"
fi
