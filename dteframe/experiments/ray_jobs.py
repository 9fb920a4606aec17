"""Do the runs of a sweep as the tasks of a Ray cluster, whose machines share the runs' folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dteframe.errors import DTEFrameError
from dteframe.experiments.sweep_jobs import Job, Outcome, do_job

if TYPE_CHECKING:
    import ray


def do_on_ray(
    jobs: Sequence[Job],
    num_at_once: int | None,
    num_cpus: float,
    num_gpus: float,
    tell: Callable[[Outcome], None],
) -> list[Outcome]:
    """Do each run where Ray finds room for it, and tell of each as it ends.

    Ray is found as it always is: ``RAY_ADDRESS``, or a cluster that was started on this machine. A task goes
    to the folder that this process is in, which all machines must have. A task whose machine dies is a failed
    attempt, and Ray does it once more elsewhere.

    Args:
        jobs: whose paths all machines see alike.
        num_at_once: tasks that are handed over at a time; None: all.
        num_cpus: of a machine, that a run takes.
        num_gpus: of a machine, that a run takes.
        tell: gets each outcome.

    Raises:
        DTEFrameError: Ray is not installed, or there is no cluster.
    """
    if find_spec("ray") is None:
        raise DTEFrameError(
            "--executor ray: needs the package ray, which is not installed; "
            "install it with: pip install 'dteframe[ray]'"
        )
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise DTEFrameError(
            "--executor ray: there is no Ray cluster here; start one with `ray start --head`, or set "
            "RAY_ADDRESS"
        ) from error
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_do_there)
    folder, threads = Path.cwd(), str(max(1, int(num_cpus)))
    outcomes: list[Outcome] = []
    left = list(jobs)
    running: dict[ray.ObjectRef[Outcome], Job] = {}
    try:
        while left or running:
            while left and (num_at_once is None or len(running) < num_at_once):
                job = left.pop(0)
                running[task.remote(job, str(folder), threads)] = job
            done, _ = ray.wait(list(running), num_returns=1)
            outcomes.append(_outcome(done[0], running.pop(done[0])))
            tell(outcomes[-1])
    except KeyboardInterrupt:
        for reference in running:
            ray.cancel(reference)
        outcomes += [Outcome(job.name, "interrupted", 1, 0.0, job.log) for job in running.values()]
    finally:
        ray.shutdown()
    outcomes += [Outcome(job.name, "interrupted", 0, 0.0, job.log) for job in left]
    return outcomes


def _outcome(reference: ray.ObjectRef[Outcome], job: Job) -> Outcome:
    """Take a task's outcome; one whose machine died, or that Ray could not do, has failed."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError:
        return Outcome(job.name, "failed", 1, 0.0, job.log)


def _do_there(job: Job, folder: str, threads: str) -> Outcome:
    """Do a run on the machine that Ray chose."""
    os.chdir(folder)
    return do_job(job, {"OMP_NUM_THREADS": threads, **os.environ}, threading.Event())
