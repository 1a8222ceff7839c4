#!/bin/bash
#SBATCH --array=0-2 --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00
#SBATCH --signal=USR1@180 --requeue --open-mode=append
# Three seeds:        sbatch experiments/launch/sbatch_array.sh --model vit_s16
# Another knob:       KNOB=split_seed sbatch --array=0-4 experiments/launch/sbatch_array.sh --model vit_s16 --data_dir D
# Each task is a run of its own (the knob is in its name), is requeued alone and goes on alone.
set -eu
cd "$SLURM_SUBMIT_DIR"
exec srun --kill-on-bad-exit=1 python experiments/run.py --devices "$SLURM_NTASKS_PER_NODE" "--${KNOB:-seed}" "$SLURM_ARRAY_TASK_ID" "$@"
