"""Do the runs of a sweep: one process each, resumed where they stand, tried once more when they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from dteframe.errors import DTEFrameError
from dteframe.recipe.sweep import Sweep
from dteframe.recipe.sweep_config import ComparisonConfig

SWEEP_FILE, LOGS = "sweep.json", "logs"
NUM_ATTEMPTS = 2
"""A run that fails is tried once more; it goes on from its newest checkpoint."""
INTERRUPTED = 130
SECONDS_TO_STOP = 60.0
"""What a run has for its step and its checkpoint once it is told to stop."""

Status: TypeAlias = Literal["finished", "was finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    name: str
    words: tuple[str, ...]
    """Of the command, after ``dteframe``."""
    folder: Path
    """The run's."""
    max_steps: int

    @property
    def log(self) -> Path:
        """Where the run's talk goes."""
        return self.folder.parent / LOGS / f"{self.name}.txt"

    def is_finished(self) -> bool:
        """Whether the run's folder has a summary of all of its steps."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return bool(summary["steps"] >= self.max_steps)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a sweep ended."""

    name: str
    status: Status
    num_attempts: int
    seconds: float
    """Wall-clock of all attempts."""
    log: Path


def jobs_of(sweep: Sweep, runs: Path, options: Sequence[str]) -> list[Job]:
    """Make a job of every run; ``options`` are further words of its command."""
    return [
        Job(
            run.name,
            ("run", str(sweep.recipe), *run.overrides, "--runs", str(runs), "--resume", *options),
            runs / run.name,
            run.recipe.training.max_steps,
        )
        for run in sweep.runs
    ]


def write_sweep_file(sweep: Sweep, runs: Path) -> None:
    """Write beside the runs what they are and how they are to be compared.

    Raises:
        DTEFrameError: runs are there that another comparison was fixed for.
    """
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / SWEEP_FILE
    comparison = None if sweep.comparison is None else sweep.comparison.model_dump()
    described = {
        run.name: {"name": run.name, "seed": run.seed, "variants": dict(run.variants)} for run in sweep.runs
    }
    if path.is_file():
        before = read_sweep_file(path)
        if before.comparison != sweep.comparison:
            there = None if before.comparison is None else before.comparison.model_dump()
            raise DTEFrameError(
                f"{path}: the comparison was fixed before the runs as {there}, and the sweep now says "
                f"{comparison}; put it back, or give another --runs"
            )
        earlier = {
            run.name: {"name": run.name, "seed": run.seed, "variants": dict(run.variants)}
            for run in before.runs
        }
        described = earlier | described
    text = json.dumps({"comparison": comparison, "runs": list(described.values())}, indent=1)
    fresh = path.with_name(f".{path.name}.writing")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)


@dataclass(frozen=True, slots=True)
class DescribedRun:
    """What a sweep's folder says of a run."""

    name: str
    seed: int
    variants: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DescribedSweep:
    """What a sweep's folder says of its runs."""

    runs: tuple[DescribedRun, ...]
    comparison: ComparisonConfig | None


def read_sweep_file(path: Path) -> DescribedSweep:
    """Read what ``write_sweep_file`` wrote.

    Raises:
        DTEFrameError: it is not such a file.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        comparison = None if read["comparison"] is None else ComparisonConfig(**read["comparison"])
        runs = [DescribedRun(run["name"], run["seed"], dict(run["variants"])) for run in read["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DTEFrameError(
            f"{path}: cannot be read ({reason}); the sweep's command writes it anew once it is deleted"
        ) from error
    return DescribedSweep(tuple(runs), comparison)


def do_locally(jobs: Sequence[Job], num_at_once: int, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Do the runs on this machine, ``num_at_once`` at a time, and tell of each as it ends.

    Ctrl-C and SIGTERM let every run write its checkpoint and end; those are ``interrupted``.
    """
    threads = max(1, (os.cpu_count() or 1) // num_at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    stopping = threading.Event()
    outcomes = []
    with _stopping_on_signals(stopping), ThreadPoolExecutor(num_at_once) as pool:
        waiting = [pool.submit(do_job, job, environment, stopping) for job in jobs]
        for done in as_completed(waiting):
            outcomes.append(done.result())
            tell(outcomes[-1])
    return outcomes


def do_job(job: Job, environment: Mapping[str, str], stopping: threading.Event) -> Outcome:
    """Do one run, a second time where the first fails; its talk goes to its log."""
    if job.is_finished():
        return Outcome(job.name, "was finished", 0, 0.0, job.log)
    began = time.perf_counter()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    status: Status = "interrupted"
    attempt = 0
    while attempt < NUM_ATTEMPTS and not stopping.is_set():
        attempt += 1
        code = _attempt(job, environment, stopping)
        if code == 0:
            status = "finished"
            break
        status = "interrupted" if code == INTERRUPTED else "failed"
        if code in (INTERRUPTED, 2):
            break  # What is wrong with a recipe is wrong the second time, too.
    return Outcome(job.name, status, attempt, time.perf_counter() - began, job.log)


def _attempt(job: Job, environment: Mapping[str, str], stopping: threading.Event) -> int:
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on in order.
    with job.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dteframe", *job.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            while not stopping.is_set():
                try:
                    return process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            _stop(process)
        return INTERRUPTED


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run that still goes write its checkpoint and end; end it if it takes too long."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _stopping_on_signals(stopping: threading.Event) -> Iterator[None]:
    """Set the event on Ctrl-C and SIGTERM, and leave what happens then to those who wait for it."""

    def stop(number: int, frame: object) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
