#!/usr/bin/env bash
# A recipe on two nodes, one job for each stage, each after the one before it (afterok). From the checkout, on a login node:
#
#     RECIPE=llama-8b-fsdp LAUNCH=fsdp2 scripts/slurm.sh --partition=gpu --account=mine
#
# What follows is given to every sbatch; NODES, GPUS (of a node), RUN and STAGES may be set too. All nodes need this folder, .venv and runs/.
# A job that was killed and is submitted again goes on from its last checkpoint; stages that are done are found unchanged.
set -euo pipefail

RECIPE=${RECIPE:-demo} LAUNCH=${LAUNCH:-multi-gpu} NODES=${NODES:-2} GPUS=${GPUS:-8} RUN=${RUN:-$RECIPE}
STAGES=${STAGES:-prepare sft reward ppo evaluate}

if [ -n "${STAGE:-}" ]; then # inside a job: one launcher on each node, which starts a process for each GPU
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export PORT=$((20000 + SLURM_JOB_ID % 20000)) HEAD STAGE RECIPE LAUNCH RUN GPUS
  # shellcheck disable=SC2016 # what differs from node to node is known there
  exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    accelerate=".venv/bin/accelerate launch --config_file configs/accelerate/$LAUNCH.yaml"
    exec $accelerate --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$HEAD" --main_process_port "$PORT" --rdzv_backend static --same_network \
      -m pipeline "$STAGE" --config "configs/$RECIPE/$STAGE.yaml" "run=$RUN"'
fi

mkdir -p runs/slurm
before=
for stage in $STAGES; do
  job=$(STAGE=$stage sbatch --parsable --nodes="$NODES" --gpus-per-node="$GPUS" --job-name="$RUN-$stage" --output="runs/slurm/%x-%j.log" \
    ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} --export=ALL "$@" "$0")
  before=${job%%;*} # a cluster's name may follow
  echo "$stage: job $before, runs/slurm/$RUN-$stage-$before.log"
done
