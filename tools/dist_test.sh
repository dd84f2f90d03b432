#!/usr/bin/env bash
# Evaluate on several GPUs (without any GPU: several processes over gloo).
#   tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of tools/test.py]
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT as for torchrun.  PYTHON chooses the interpreter.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT NPROC [arguments of tools/test.py]" >&2
    exit 2
fi
config=$1
checkpoint=$2
nproc=$3
shift 3
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$nproc" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
