"""The runs of a sweep as a job array of SLURM: one script, printed for sbatch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

SCRIPT = """\
#!/usr/bin/env bash
# {num_runs} runs, each on one machine: change what is asked of SLURM here, then `sbatch THIS_FILE`.
# A task that SLURM stops or queues again goes on from its run's newest checkpoint.
#SBATCH --job-name={name}
#SBATCH --array=1-{num_runs}{at_once}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={num_gpus}
#SBATCH --cpus-per-task={num_cpus}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
command=$(sed -n "${{SLURM_ARRAY_TASK_ID:?is set by sbatch}}p" <<'COMMANDS'
{commands}
COMMANDS
)
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-4}}"
echo "$command"
exec srun bash -c "exec $command"
"""


def slurm_script(
    name: str, commands: Sequence[Sequence[str]], num_at_once: int | None, num_cpus: int, num_gpus: int
) -> str:
    """Write a job array with a task per command.

    Args:
        name: of the job.
        commands: words each, run in the folder that sbatch is called in.
        num_at_once: tasks that run at a time; None: as many as there is room for.
        num_cpus: that a task asks for.
        num_gpus: that a task asks for.
    """
    return SCRIPT.format(
        name=name,
        num_runs=len(commands),
        at_once="" if num_at_once is None else f"%{num_at_once}",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        commands="\n".join(shlex.join(command) for command in commands),
    )
