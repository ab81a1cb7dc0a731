#!/usr/bin/env bash
# Train Flan-T5-XL, sharded over four GPUs by ZeRO-3, then export the shards to one adapter. DATA is a file of
# conversations.
set -euo pipefail
DATA=${DATA:?a file of conversations}
MODEL=${MODEL:-google/flan-t5-xl}
OUTPUT=${OUTPUT:-runs}
PROCESSES=${PROCESSES:---num-gpus 4}

t5tune train --config flan-t5-xl-lora --model-name-or-path "$MODEL" --data-path "$DATA" --output-dir "$OUTPUT/run" \
    $PROCESSES "$@"
# gathers the shards of the newest checkpoint; after the run, the run folder itself contains the same adapter
t5tune export "$OUTPUT/run" --output-dir "$OUTPUT/adapter" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/adapter" --output-dir "$OUTPUT/merged" --overwrite
