#!/usr/bin/env bash
# Flan-T5-XL sharded over four cards by ZeRO-3, then one adapter of the shards. DATA names the conversations.
set -euo pipefail
DATA=${DATA:?a file of conversations}
MODEL=${MODEL:-google/flan-t5-xl}
OUTPUT=${OUTPUT:-runs}
PROCESSES=${PROCESSES:---num-gpus 4}

t5tune train --config flan-t5-xl-lora --model-name-or-path "$MODEL" --data-path "$DATA" --output-dir "$OUTPUT/run" \
    $PROCESSES "$@"
# the newest checkpoint's shards; the run folder itself holds the same adapter once the run is over
t5tune export "$OUTPUT/run" --output-dir "$OUTPUT/adapter" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/adapter" --output-dir "$OUTPUT/merged" --overwrite
