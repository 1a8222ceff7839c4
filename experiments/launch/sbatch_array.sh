#!/bin/bash
#SBATCH --array=0-2 --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00
#SBATCH --signal=USR1@180 --requeue --open-mode=append
# Three seeds:        sbatch experiments/launch/sbatch_array.sh --model vit_s16
# Another knob:       VITLAB_KNOB=split_seed sbatch --array=0-4 experiments/launch/sbatch_array.sh --model vit_s16 --data_dir D
# Each task is a run of its own (the knob is in its name), is requeued alone and goes on alone.
# srun of SLURM 22.05 and later gives a task one core unless it is told the job's --cpus-per-task again.
set -eu
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "sbatch_array.sh is an array of SLURM's jobs: sbatch --array=0-2 experiments/launch/sbatch_array.sh $*" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  python experiments/run.py --devices "$SLURM_NTASKS_PER_NODE" "--${VITLAB_KNOB:-seed}" "$SLURM_ARRAY_TASK_ID" "$@"
