#!/bin/bash
# Trains on several machines under SLURM, one process for each GPU: so JAX finds them by itself.
# Edit: the lines below, and your partition and account. The repository and its .venv must be where all machines see them.
# Start, in the repository: sbatch experiments/launch/slurm.sh --name big --steps 100000
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# --signal ends the tasks, not this script, two minutes before --time is over: they save, and are queued again.
# No --gpus-per-task: JAX gives each process its GPU by SLURM_LOCALID, and so must see all of the machine.
set -uo pipefail

# srun asks for the CPUs anew: since SLURM 22.05 it has only one else.
# --wait ends tasks that are still there two minutes after the first ended.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120 .venv/bin/python experiments/pretrain.py "$@"
code=$?

# srun's code is the highest of all tasks. 1 is an error that would come again. 75 is a stop that the last checkpoint
# goes on from, or a lost process; above 128 a process was lost too, by the signal of that number less 128.
if ((code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < 10)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
