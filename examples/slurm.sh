#!/bin/bash
# Two machines of eight GPUs: sbatch examples/slurm.sh RECIPE RUN_FOLDER, from the repository's root.
# The recipe, its weights and the run folder lie where every machine sees them. The same command goes on with a run.
#SBATCH --job-name=varl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch examples/slurm.sh RECIPE RUN_FOLDER"}
out=${2:?"usage: sbatch examples/slurm.sh RECIPE RUN_FOLDER"}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a machine; it starts a process a GPU. When a process fails, all end, and the job with them.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 0 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m varl train "$recipe" --run.out "$out" --parallel.mode fsdp2
