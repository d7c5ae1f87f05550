#!/usr/bin/env bash
# How fast does the 8B model answer about a video on this GPU? Decoding, ViT, prompt, first token and tokens a second for
# 8, 64 and 160 frames, in bfloat16 and int8, beside the bandwidth that a copy reaches. Weights are random. Under 10 minutes
# with 16 CPUs, most of them XLA's:
#
#   [PRESET=kangaroo_8b] [FRAMES=8,64,160] ./launch/bench_chat_gpu.sh [FOLDER]
#
# FOLDER (default bench_chat) gets a file of each: what was printed, and chat-FORM.json. Runs in the environment that is
# active, which has kangaroo_jax and a JAX for the GPU (pip install -e '.[cuda]').
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

case "${1:-}" in
  --help) head_of launch/bench_chat_gpu.sh; exit 0 ;;
  -*) refuse bench_chat_gpu.sh "unknown flag $1; --help says what there is" ;;
esac
folder="${1:-bench_chat}"
mkdir -p "$folder"
python -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' ||
  refuse bench_chat_gpu.sh "JAX sees no accelerator here: kangaroo bench chat --preset=tiny measures a CPU"
status=0
for form in "" --quantize=int8; do # the second is measured whatever becomes of the first
  name="${form#--quantize=}"
  python -m kangaroo_jax bench chat --preset="${PRESET:-kangaroo_8b}" --frames="${FRAMES:-8,64,160}" --rounds=2 \
    ${form:+"$form"} --folder="$folder" --json > "$folder/chat-${name:-bfloat16}.json" || status=1
done
python -c 'import json, sys
from kangaroo_jax.bench.answering import table
for path in sys.argv[1:]:
    text = open(path).read()
    if text:
        found = json.loads(text)
        print(found["device"], found["preset"], found["quantize"] or found["dtype"], found["bandwidth_gib_s"], "GiB/s")
        print(table(found))' "$folder"/chat-*.json
exit "$status"
