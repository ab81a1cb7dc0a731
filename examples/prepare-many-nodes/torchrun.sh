#!/usr/bin/env bash
# Run this on each node, with the same HOST, which is one of the nodes:
#
#     HOST=node1 NODES=4 examples/prepare-many-nodes/torchrun.sh --model-name-or-path google/flan-t5-base \
#         --data-path /shared/chats.jsonl --output-dir /shared/cache
#
# One process per node prepares a part with all cores of the node.
set -euo pipefail

if [ "${NODES:-1}" -gt 1 ]; then
    place=(--rdzv-backend c10d --rdzv-endpoint "${HOST:?set it to one of the nodes}:29500" --rdzv-id prepare)
else
    place=(--standalone)
fi
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES_PER_NODE:-1}" "${place[@]}" \
    -m t5tune prepare --shard auto "$@"
