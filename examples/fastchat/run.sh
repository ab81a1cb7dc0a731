#!/usr/bin/env bash
# The LoRA training of a T5 that FastChat documents, on FastChat's example data. DATA is that file.
set -euo pipefail
DATA=${DATA:?a ShareGPT file, such as data/dummy_conversation.json of the FastChat repository}
MODEL=${MODEL:-google/flan-t5-xl}
OUTPUT=${OUTPUT:-runs}

t5tune train --config fastchat --model-name-or-path "$MODEL" --data-path "$DATA" --output-dir "$OUTPUT/run" "$@"
t5tune export "$OUTPUT/run" --output-dir "$OUTPUT/adapter" --overwrite
t5tune merge --model-name-or-path "$MODEL" --adapter "$OUTPUT/adapter" --output-dir "$OUTPUT/merged" --overwrite
t5tune chat --model-name-or-path "$OUTPUT/merged" --prompt "Who are you?"
