#!/usr/bin/env bash
# QLoRA on Flan-T5-XXL, on one 24 GB GPU. DATA is a file of conversations.
set -euo pipefail
DATA=${DATA:?a file of conversations}
MODEL=${MODEL:-google/flan-t5-xxl}
OUTPUT=${OUTPUT:-runs}

t5tune prepare --model-name-or-path "$MODEL" --data-path "$DATA" --output-dir "$OUTPUT/cache" --model-max-length 1024
t5tune train --config flan-t5-xxl-qlora --model-name-or-path "$MODEL" --data-path "$OUTPUT/cache" \
    --output-dir "$OUTPUT/run" "$@"
t5tune export "$OUTPUT/run" --output-dir "$OUTPUT/adapter" --overwrite
