#!/usr/bin/env bash
# FastChat's documented training of a T5 with LoRA, on its own example data. DATA names that file.
set -euo pipefail
DATA=${DATA:?a ShareGPT file, such as data/dummy_conversation.json of the FastChat repository}
MODEL=${MODEL:-google/flan-t5-xl}
OUTPUT=${OUTPUT:-runs}

t5tune train --config fastchat --model-name-or-path "$MODEL" --data-path "$DATA" --output-dir "$OUTPUT/run" "$@"
t5tune export "$OUTPUT/run" --output-dir "$OUTPUT/adapter" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/adapter" --output-dir "$OUTPUT/merged" --overwrite
t5tune chat --model-name-or-path "$OUTPUT/merged" --prompt "Who are you?"
