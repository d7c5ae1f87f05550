#!/usr/bin/env bash
# What does a train step take on one GPU? Stages 3, 4 and 5 of kangaroo_8b with fewer layers of its decoder, each
# attention in turn, packed as in training, and a trace with the first of them; ten minutes at most:
#
#   [DEPTH=8] [STEPS=5] [PRESET=kangaroo_8b] [ATTENTIONS="triton xla_chunked"] [SECONDS_IN_ALL=570]
#   ./launch/bench_gpu.sh [FOLDER]
#
# Run it where the package and its extra `cuda` are installed. Lines of JSON, what the formula foretells beside what
# was measured, go to FOLDER/gpu-DATE.jsonl (docs/measurements), traces for xprof beside them. DEPTH is what 80 GB
# hold; 0 leaves the preset's layers. A command that fails, or for which no time is left, leaves a line that says so,
# and the next one is run. With the extra `tokamax`, on Hopper, ATTENTIONS="tokamax triton xla_chunked".
# KANGAROO_BENCH_STAGES names other stages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

case "${1:-}" in
  --help) head_of launch/bench_gpu.sh; exit 0 ;;
  -*) refuse bench_gpu.sh "unknown flag $1; --help says what there is" ;;
esac
DEPTH="${DEPTH:-8}" STEPS="${STEPS:-5}" PRESET="${PRESET:-kangaroo_8b}" SECONDS_IN_ALL="${SECONDS_IN_ALL:-570}"
check_numbers bench_gpu.sh DEPTH STEPS SECONDS_IN_ALL
read -ra attentions <<<"${ATTENTIONS:-triton xla_chunked}"
read -ra stages <<<"${KANGAROO_BENCH_STAGES:-stage3_refine stage4_instruct stage5_long_video}"
folder="${1:-docs/measurements}"
mkdir -p "$folder"
out="$folder/gpu-$(date -u +%Y-%m-%d).jsonl"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
failed=0

# measure STAGE ATTENTION [FLAGS...]: a line of JSON.
measure() {
  local stage="$1" attention="$2" line
  shift 2
  local flags=(--config="$stage:$PRESET" --config.model.attention="$attention" --packs=1 --segments=4 --steps="$STEPS")
  if ((DEPTH)); then flags+=(--config.model.llm.depth="$DEPTH"); fi
  local left=$((SECONDS_IN_ALL - SECONDS))
  if ((left > 0)) && line="$(timeout "$left" python -m kangaroo_jax bench train "${flags[@]}" --json "$@")"; then
    line="${line//$'\n'/ }"
    printf '{"stage": "%s", "depth": %s, "segments": 4, %s\n' "$stage" "$DEPTH" "${line#\{}" | tee -a "$out"
  else
    failed=1
    printf '{"stage": "%s", "depth": %s, "attention": "%s", "failed": true}\n' "$stage" "$DEPTH" "$attention" | tee -a "$out"
  fi
}

for attention in "${attentions[@]}"; do
  for stage in "${stages[@]}"; do
    if [[ "$attention" == "${attentions[0]}" ]]; then
      measure "$stage" "$attention" --profile="$folder/trace-$stage"
    else
      measure "$stage" "$attention"
    fi
  done
done
echo "bench_gpu: $out"
exit "$failed"
