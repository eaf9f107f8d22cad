#!/usr/bin/env bash
# Run a recipe on a Slurm cluster: one job for each stage, started once the job before it succeeded (afterok).
# Run it from the checkout on a login node:
#
#     RECIPE=llama-8b-fsdp LAUNCH=fsdp2 scripts/slurm.sh --partition=gpu --account=mine
#
# The arguments are passed to every sbatch. These variables may be set:
#
#     RECIPE   a folder of configs/ (demo)
#     LAUNCH   a file of configs/accelerate/ (multi-gpu)
#     NODES    nodes of a job (2)
#     GPUS     GPUs of a node (8)
#     RUN      name of the run (that of the recipe)
#     STAGES   stages to run (all five)
#
# All nodes need this folder, .venv and runs/. To continue after a job was killed, submit again: its stage
# resumes from the last checkpoint, and complete stages are reused.
set -euo pipefail

RECIPE=${RECIPE:-demo} LAUNCH=${LAUNCH:-multi-gpu} NODES=${NODES:-2} GPUS=${GPUS:-8} RUN=${RUN:-$RECIPE}
STAGES=${STAGES:-prepare sft reward ppo evaluate}

if [ -n "${STAGE:-}" ]; then # inside a job: one launcher on each node starts a process for each GPU
  # `head -n 1` would stop reading early; scontrol could then fail with SIGPIPE, which pipefail reports.
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  export PORT=$((20000 + SLURM_JOB_ID % 20000)) HEAD STAGE RECIPE LAUNCH RUN GPUS
  # shellcheck disable=SC2016 # each node expands the variables itself: SLURM_NODEID differs
  exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    accelerate=".venv/bin/accelerate launch --config_file configs/accelerate/$LAUNCH.yaml"
    exec $accelerate --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) \
      --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT" \
      --rdzv_backend static --same_network \
      -m pipeline "$STAGE" --config "configs/$RECIPE/$STAGE.yaml" "run=$RUN"'
fi

mkdir -p runs/slurm
before=
for stage in $STAGES; do
  job=$(STAGE=$stage sbatch --parsable --nodes="$NODES" --gpus-per-node="$GPUS" \
    --job-name="$RUN-$stage" --output="runs/slurm/%x-%j.log" \
    ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} --export=ALL "$@" "$0")
  before=${job%%;*} # --parsable prints "job" or "job;cluster"
  echo "$stage: job $before, runs/slurm/$RUN-$stage-$before.log"
done
