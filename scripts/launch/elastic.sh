#!/usr/bin/env bash
# Train on several machines, and start again by itself when a process or a machine is lost. The same line on each of them:
#
#   MASTER_ADDR=first-machine scripts/launch/elastic.sh RECIPE [a.b=value …]
#
# output_dir must be on a file system that all of them see. What else the environment may say:
#   NODES         machines, or MIN:MAX of them               (2)
#   PROCESSES     on each machine: a number, or gpu          (gpu)
#   MASTER_PORT   of the first machine                       (29400)
#   MAX_RESTARTS  until the run is given up                  (3)
#   STOP_SECONDS  for a checkpoint, when asked to stop       (300)
#   RUN_ID        tells runs apart that meet at one address  (alignkit)
# and any option of torchrun as PET_<OPTION>, such as PET_LOCAL_ADDR.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    sed -n '2,/^set/{/^#/!d; s/^# \{0,1\}//; p}' "$0"
    exit 2
fi
: "${MASTER_ADDR:?name the first machine, as all of them reach it}"

# Else processes that start again read the addresses of those before them in the store that the agents share, and fail to meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes="${NODES:-2}" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id="${RUN_ID:-alignkit}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout="${STOP_SECONDS:-300}" \
    -m alignkit train --resume "$@"
