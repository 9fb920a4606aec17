#!/usr/bin/env bash
# The runs of a sweep under SLURM, each on one machine with all of its GPUs, as the tasks of a job array.
#
#   dteframe sweep recipes/sweeps/paper_pairs.yaml --resume --processes 8 > commands.txt
#   sbatch --array "1-$(wc -l < commands.txt)%4" recipes/cluster/slurm_sweep.sh commands.txt      # four at a time
#
# A task that SLURM queues again goes on from its run's newest checkpoint, because of --resume.
#SBATCH --job-name=dteframe-sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ "$#" -ne 1 ] || [ ! -f "$1" ]; then
    echo "usage: sbatch --array 1-N recipes/cluster/slurm_sweep.sh COMMANDS, a file of N commands" >&2
    exit 2
fi
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
if [ -z "$command" ]; then
    echo "$1: has no line ${SLURM_ARRAY_TASK_ID}; give --array 1-$(wc -l < "$1")" >&2
    exit 2
fi
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
echo "$command"
exec srun bash -c "exec $command"
