#!/bin/bash
# One machine:   experiments/launch/torchrun.sh 8 --model vit_b16
# Several:       VITLAB_HEAD=node0 VITLAB_NODES=4 experiments/launch/torchrun.sh 8 --model vit_b16      (on each machine, the same line)
# A rank that dies, or is preempted, restarts all up to VITLAB_RESTARTS times (3); they go on from last.ckpt. A wrong command line does not: it is
# told once, exit code 2. VITLAB_GRACE: seconds a preempted run has to save (120). VITLAB_PORT (29500), VITLAB_RUN_ID (vitlab): where several
# machines meet, other ones for a second run on them; one machine takes a free port.
# A SIGTERM to this command reaches the ranks, which save; it leaves with 75, and the same command goes on.
set -eu
exec python "$(dirname "$0")/torchrun.py" "$@"
