#!/usr/bin/env bash
# Train on train.csv, score heldout.csv, and merge. Set MODEL and OUTPUT to change the model and the output folder;
# arguments are passed on to train.
set -euo pipefail
cd "$(dirname "$0")"
MODEL=${MODEL:-google/flan-t5-base}
OUTPUT=${OUTPUT:-runs}
columns=(--source-column dialogue --target-column note --source-prefix "summarize: " --conversation-template plain)

t5tune train --model-name-or-path "$MODEL" --data-path train.csv "${columns[@]}" --output-dir "$OUTPUT/run" \
    --learning-rate 3e-4 --per-device-train-batch-size 8 --num-train-epochs 5 "$@"
t5tune evaluate --model-name-or-path "$MODEL" --adapter "$OUTPUT/run" --data-path heldout.csv "${columns[@]}" \
    --output-dir "$OUTPUT/scores" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/run" --output-dir "$OUTPUT/merged" --overwrite
