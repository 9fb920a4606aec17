#!/usr/bin/env bash
# One run on several machines under SLURM: a torchrun per machine; they meet at the first machine and start a process per GPU.
#
#   sbatch --nodes 2 recipes/cluster/slurm.sh recipes/math_qwen.yaml [KEY=VALUE]... [OPTION]...
#
# The words are those of `dteframe run`. The folder, the environment, runs/ and DTEFRAME_CACHE must be the same on all
# machines (docs/guides/run_on_several_gpus.md). Five minutes before the time is up the run is told to end; submitted
# again, it goes on from its newest checkpoint, as it does when SLURM queues it again by itself.
#SBATCH --job-name=dteframe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ "$#" -eq 0 ]; then
    echo "usage: sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE]... [OPTION]..." >&2
    exit 2
fi
# The environment in which dteframe is installed; the same path on all machines.
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A port of this job's own: two jobs may share a machine.
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# Without being told who is the host, torchrun compares names and addresses, which not every cluster gives it.
# shellcheck disable=SC2016  # SLURM_PROCID is that of each machine's task
exec srun --kill-on-bad-exit=1 bash -c 'exec torchrun --rdzv-conf "is_host=$((SLURM_PROCID == 0))" "$@"' torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES_PER_MACHINE:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    -m dteframe run "$@" --resume
