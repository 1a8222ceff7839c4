#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00
#SBATCH --signal=USR1@180 --requeue --open-mode=append
# One run:            sbatch experiments/launch/sbatch.sh --model vit_b16
# On four machines:   sbatch --nodes=4 experiments/launch/sbatch.sh --model vit_b16
# 180 seconds before the time is over SLURM sends SIGUSR1: the run saves at the step, requeues the job and goes on when it starts again.
# srun of SLURM 22.05 and later gives a task one core unless it is told the job's --cpus-per-task again.
set -eu
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "sbatch.sh is for SLURM: sbatch experiments/launch/sbatch.sh $*; without SLURM: experiments/launch/torchrun.sh 8 $*" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  python experiments/run.py --num_nodes "$SLURM_NNODES" --devices "$SLURM_NTASKS_PER_NODE" "$@"
