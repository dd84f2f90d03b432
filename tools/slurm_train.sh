#!/usr/bin/env bash
# Train on the machines of a Slurm cluster.
#   tools/slurm_train.sh PARTITION CONFIG GPUS [arguments of tools/train.py]
# GPUS in all; GPUS_PER_NODE (8), CPUS_PER_TASK (5), JOB_NAME and SRUN_ARGS change what srun is asked for.  PYTHON chooses
# the interpreter, PORT the port of the first machine.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
partition=$1
config=$2
gpus=$3
shift 3
per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
if [ $((gpus % per_node)) -ne 0 ]; then
    echo "$gpus GPUs are no whole number of machines with $per_node each; set GPUS_PER_NODE" >&2
    exit 2
fi
export MASTER_PORT="${PORT:-29500}"
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="${JOB_NAME:-kd_mm}" --nodes=$((gpus / per_node)) --ntasks="$gpus" \
    --ntasks-per-node="$per_node" --gres=gpu:"$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
