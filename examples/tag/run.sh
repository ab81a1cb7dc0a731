#!/usr/bin/env bash
# Train on train.jsonl, score heldout.jsonl, merge, and tag one message. Set MODEL and OUTPUT to change the model and the
# output folder; arguments are passed on to train.
set -euo pipefail
cd "$(dirname "$0")"
MODEL=${MODEL:-google/flan-t5-base}
OUTPUT=${OUTPUT:-runs}

t5tune train --model-name-or-path "$MODEL" --data-path train.jsonl --objective tag --output-dir "$OUTPUT/run" \
    --learning-rate 1e-3 --per-device-train-batch-size 8 --num-train-epochs 5 "$@"
t5tune evaluate --model-name-or-path "$MODEL" --adapter "$OUTPUT/run" --data-path heldout.jsonl \
    --output-dir "$OUTPUT/scores" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/run" --output-dir "$OUTPUT/merged" --overwrite
t5tune chat --model-name-or-path "$OUTPUT/merged" \
    --prompt "Hello , Dora Maas here . Could you bring a lamp to 14 Oak Avenue on Friday ?"
