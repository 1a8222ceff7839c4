#!/bin/bash
# One machine:   experiments/launch/torchrun.sh 8 --model vit_b16
# Several:       HEAD=node0 NODES=4 experiments/launch/torchrun.sh 8 --model vit_b16      (on each machine, the same line)
# A rank that dies, or is preempted, restarts all up to RESTARTS times; they go on from last.ckpt. GRACE: seconds a preempted run has to save.
# A SIGTERM to torchrun itself reaches the ranks, which save and leave with 75; torchrun's own exit code is then 1.
set -eu
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else a restarted attempt may read the dead one's addresses ("connectFullMesh")
devices=$1; shift
exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="$devices" --max-restarts="${RESTARTS:-3}" --shutdown-timeout="${GRACE:-120}" \
  --rdzv-backend=c10d --rdzv-id="${RUN:-vitlab}" --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  "$(dirname "$0")/../run.py" --num_nodes "${NODES:-1}" --devices "$devices" "$@"
