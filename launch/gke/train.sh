#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster: writes a JobSet (https://jobset.sigs.k8s.io) and applies it.
#
#   ./launch/gke/train.sh --name=kangaroo --image=REGISTRY/kangaroo:TAG --type=v5e --topology=4x8 [--slices=N] \
#       [--claim=PVC] [--restarts=N] [--namespace=N] [--flags=NAME] [--dry-run] \
#       -- train --config=configs/stage5_long_video.py:kangaroo_8b --workdir=/mnt/kangaroo/stage5
#
# --flags names flags of libtpu (launch/tpu_flags, which says who measured them); without it there are none.
# launch/Dockerfile makes the image. The volume claim is mounted at /mnt/kangaroo. A lost host ends its peers with
# code 75, the JobSet starts all pods again, and the training goes on after its last checkpoint. --dry-run prints the
# manifest. With XPK the same image and command run as: xpk workload create --tpu-type=TYPE --docker-image=IMAGE
# --command='kangaroo ...'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/arguments.sh

name="" image="" type="" topology="" slices=1 claim="" restarts=100 namespace=default flags="" dry_run=0
while [[ $# -gt 0 && "$1" != -- ]]; do
  check_flag gke/train.sh "$1"
  case "$1" in
    --help) head_of launch/gke/train.sh; exit 0 ;;
    --name=* | --image=* | --type=* | --topology=* | --slices=* | --claim=* | --restarts=* | --namespace=* | --flags=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --dry-run) dry_run=1 ;;
    *) refuse gke/train.sh "unknown flag $1; --help lists them" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
for flag in name image type topology; do
  [[ -n "${!flag}" ]] || refuse gke/train.sh "--$flag is missing"
done
check_numbers gke/train.sh slices restarts
[[ $# -gt 0 ]] || refuse gke/train.sh "nothing to run; give the arguments of kangaroo after --"
[[ "$topology" =~ ^[0-9]+(x[0-9]+)*$ ]] || refuse gke/train.sh "--topology=$topology: chips by axis are needed, as 4x8"
case "$type" in # the node label, and the chips of one host in a slice of several hosts
  v4) accelerator=tpu-v4-podslice chips_a_host=4 ;;
  v5e) accelerator=tpu-v5-lite-podslice chips_a_host=4 ;;
  v5p) accelerator=tpu-v5p-slice chips_a_host=4 ;;
  v6e) accelerator=tpu-v6e-slice chips_a_host=4 ;;
  *) refuse gke/train.sh "--type=$type: one of v4, v5e, v5p, v6e" ;;
esac
chips=1
for size in ${topology//x/ }; do chips=$((chips * size)); done
((chips < chips_a_host)) && chips_a_host=$chips
hosts=$((chips / chips_a_host))

libtpu="$(tpu_flags gke/train.sh "$flags")" || exit
variable=""
if [[ -n "$libtpu" ]]; then
  variable="
                    - name: LIBTPU_INIT_ARGS
                      value: $libtpu"
fi

arguments=""
for argument in "$@"; do arguments+="                    - $(printf '%s' "$argument" | python3 -c 'import json,sys; print(json.dumps(sys.stdin.read()))')"$'\n'; done
volume="" mount=""
if [[ -n "$claim" ]]; then
  mount="
                  volumeMounts:
                    - name: work
                      mountPath: /mnt/kangaroo"
  volume="
              volumes:
                - name: work
                  persistentVolumeClaim:
                    claimName: $claim"
fi

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              securityContext:
                fsGroup: 1000
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: train
                  image: $image
                  command: [kangaroo]
                  args:
${arguments%$'\n'}
                  env:
                    - name: KANGAROO_PROCESSES
                      value: auto$variable
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $chips_a_host$mount$volume"

if [[ $dry_run == 1 ]]; then
  echo "+ kubectl apply -f - <<MANIFEST"
  echo "$manifest"
  echo "MANIFEST"
else
  kubectl apply -f - <<<"$manifest"
fi
