#!/bin/bash
# Train a recipe on any number of hosts: sbatch --nodes 4 examples/slurm.sh recipe.yaml /shared/run
#SBATCH --job-name=fastmllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

recipe=$1 out=$2
gpus=${SLURM_GPUS_ON_NODE:-8}
ranks=$((SLURM_NNODES * gpus))
# A step is this many micro-batches on any number of ranks: a requeued job may get other hosts and goes on.
micro_batches=${MICRO_BATCHES:-$ranks}
if ((micro_batches % ranks)); then
    echo "MICRO_BATCHES is $micro_batches: no multiple of $ranks ranks; ask for other nodes" >&2
    exit 2
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))

# One agent a host; the first that fails ends the others.
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$1" --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        -m fastmllm train "$2" "engine.accumulation=$3" --out "$4"
' bash "$gpus" "$recipe" "$((micro_batches / ranks))" "$out"
