#!/usr/bin/env bash
# Train on a Cloud TPU slice: asks for it as a queued resource, waits, installs, runs, and goes on by itself after
# a preemption or a crash.
#
#   ./launch/tpu_pod.sh --name=kangaroo --zone=us-east5-b --project=PROJECT --type=v5litepod-32 \
#       --bucket=gs://BUCKET/kangaroo [--spot] [--slices=N] [--runtime=VERSION] [--flags=NAME] [--dry-run] \
#       -- train --config=configs/stage5_long_video.py:kangaroo_8b --workdir=/mnt/kangaroo/stage5
#
# --flags names flags of libtpu (launch/tpu_flags, which says who measured them); without it there are none.
# What stands after -- are the arguments of `kangaroo`. The bucket is mounted at /mnt/kangaroo on every host. The hosts
# get this clone's tracked files as they are now (`git add` what you made), and nothing else of it. --dry-run prints
# every command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/restart.sh

name="" zone="" project="" type="" bucket="" runtime="" flags="" slices=1 spot=0 dry_run=0
while [[ $# -gt 0 && "$1" != -- ]]; do
  check_flag tpu_pod.sh "$1"
  case "$1" in
    --help) head_of launch/tpu_pod.sh; exit 0 ;;
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --flags=*) flags="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    *) refuse tpu_pod.sh "unknown flag $1; --help lists them" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
for flag in name zone project type bucket; do
  [[ -n "${!flag}" ]] || refuse tpu_pod.sh "--$flag is missing"
done
check_numbers tpu_pod.sh slices
[[ $# -gt 0 ]] || refuse tpu_pod.sh "nothing to run; give the arguments of kangaroo after --"
git rev-parse --is-inside-work-tree &>/dev/null || refuse tpu_pod.sh "no git clone, of which the tracked files could be sent"
libtpu="$(tpu_flags tpu_pod.sh "$flags")" || exit
if [[ -z "$runtime" ]]; then
  case "$type" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
where=(--zone="$zone" --project="$project")
export dry_run

create() {
  local flags=()
  [[ $spot == 1 ]] && flags+=(--spot)
  if [[ $slices -gt 1 ]]; then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" ${flags[@]+"${flags[@]}"}
}

state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE; }

wait_until_active() {
  if [[ $dry_run == 1 ]]; then
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  local now
  while now="$(state)"; [[ "$now" != ACTIVE ]]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | NONE)
        [[ "$now" != NONE ]] && run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
        create
        ;;
    esac
    echo "$(date -u +%H:%M:%S) $name is ${now}" >&2
    sleep 30
  done
}

nodes() { # the names of the slices' nodes
  if [[ $slices -gt 1 ]]; then
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  else
    echo "$name"
  fi
}

on_all_hosts() { # COMMAND: run it on every host of every slice at once; fails if it fails anywhere
  local command="$1" node status=0 pids=()
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$command" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

# The archive goes through folders that are nobody else's on both sides: `scratch` here, the user's home there.
prepare() {
  local node file
  git ls-files -z | while IFS= read -r -d '' file; do
    if [[ -e "$file" || -L "$file" ]]; then printf '%s\0' "$file"; fi # not what was deleted here
  done >"$scratch/files" || return
  run tar --null -T "$scratch/files" -czf "$scratch/kangaroo_jax.tgz" || return
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$scratch/kangaroo_jax.tgz" "$node:" "${where[@]}" --worker=all || return
  done
  on_all_hosts "set -e; mkdir -p ~/kangaroo_jax; tar -xzf ~/kangaroo_jax.tgz -C ~/kangaroo_jax; rm ~/kangaroo_jax.tgz
if ! mountpoint -q /mnt/kangaroo; then
  sudo install -d -m 700 -o \"\$(id -un)\" /mnt/kangaroo
  gcsfuse --implicit-dirs --only-dir $(printf '%q' "$(bucket_folder)") $(printf '%q' "$(bucket_name)") /mnt/kangaroo
fi
cd ~/kangaroo_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
}

bucket_name() { local path="${bucket#gs://}"; echo "${path%%/*}"; }
bucket_folder() { local path="${bucket#gs://}"; [[ "$path" == */* ]] && echo "${path#*/}" || echo ""; }

attempt() { # once: get the slice, install, train; 0 when the training is done
  wait_until_active && prepare &&
    on_all_hosts "cd ~/kangaroo_jax && ${libtpu:+LIBTPU_INIT_ARGS=$(printf '%q' "$libtpu") }KANGAROO_PROCESSES=auto .venv/bin/kangaroo $(printf '%q ' "$@")"
}

umask 077
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
[[ $dry_run == 1 ]] && create
restart_until_done attempt "$@"
run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
