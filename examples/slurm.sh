#!/usr/bin/env bash
#SBATCH --job-name=hf_parcor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00

# Several machines, one launcher on each, one process a GPU. From the root of the repository:
#     sbatch examples/slurm.sh examples/train_sst2.py --output_dir out --do_train --do_eval

set -euo pipefail

# The first machine is where all processes meet.
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MEETING_HOST=${HOSTS%%$'\n'*}
MEETING_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine must not meet at the same place
export MEETING_HOST MEETING_PORT

# Single quotes: the variables are those of each machine. If one process ends with an error, so does the job.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch \
        --config_file examples/accelerate_configs/multi_node.yaml \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MEETING_HOST" \
        --main_process_port "$MEETING_PORT" \
        "$@"
' launch "$@"
