"""Score completions in worker processes while sampling goes on; one that hangs or dies is replaced.

Each thread of the pool has a worker of its own to ask. So the scores depend neither on how many workers there
are nor on which of them is asked; only what a clock decides, a timeout, may differ from run to run.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from dteframe.contracts import Context, Reward
from dteframe.engine import calls
from dteframe.engine.failure_watch import FailureWatch
from dteframe.engine.reward_worker import WorkerSettings
from dteframe.engine.scoring import Reply, Scores, attempt_with, named_rewards, score_group
from dteframe.errors import PluginError
from dteframe.recipe import TrainingConfig
from dteframe.records import Completion, Question
from dteframe.registry import Registry

SECONDS_TO_START = 300.0
"""A machine may be busy with loading the model when a worker starts."""
SECONDS_TO_END = 2.0
"""A process that dies closes its files before others can see how it ended."""
MAX_REPLY_BYTES = 2**26
MAX_AUTOMATIC_WORKERS = 4
KEEPER = Path(__file__).with_name("reward_keeper.py")
START = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from dteframe.engine.reward_worker import serve
serve(int(sys.argv[1]))
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
}
"""Of workers: they share the cores, take no memory of the GPU from the policy, and go through sets alike."""

PendingScores: TypeAlias = Callable[[], Scores]
"""Gives the scores of a group, and waits for them if need be."""


class RewardPool:
    """Worker processes that score, and the threads that ask them."""

    def __init__(
        self, settings: WorkerSettings, names: Sequence[str], num_workers: int, timeout_seconds: float
    ) -> None:
        """Begin to start the workers, and do not wait for them.

        Args:
            settings: what workers start with.
            names: of the rewards.
            num_workers: 1 or more.
            timeout_seconds: for the completions of a question together, and then for each alone.
        """
        self._names = tuple(names)
        self._workers = [_Worker(pickle.dumps(settings), timeout_seconds) for _ in range(num_workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers, "rewards")
        for worker in self._workers:
            self._idle.put(worker)
            self._threads.submit(self._start_next)

    def submit(
        self, question: Question, completions: Sequence[Completion], watch: FailureWatch | None = None
    ) -> PendingScores:
        """Have the completions of a question scored once a worker is free, unless ``watch`` gives up."""
        return self._threads.submit(self._score, question, completions, watch).result

    def close(self) -> None:
        """End all workers, what they are doing included; returns when no process is left."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()

    def _start_next(self) -> None:
        worker = self._idle.get()
        try:
            worker.start()
        finally:
            self._idle.put(worker)

    def _score(
        self, question: Question, completions: Sequence[Completion], watch: FailureWatch | None
    ) -> Scores:
        worker = self._idle.get()
        score = watch.score if watch else score_group
        try:
            return score(worker.ask, self._names, question, completions)
        finally:
            self._idle.put(worker)


class RewardsHere:
    """Rewards scored in the run's own process, whenever their scores are asked for."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        """Start the rewards, which are given by name."""
        for reward in rewards.values():
            with calls.running(reward):
                reward.start()
        self._names = tuple(rewards)
        self._attempt = attempt_with(rewards, [])

    def submit(
        self, question: Question, completions: Sequence[Completion], watch: FailureWatch | None = None
    ) -> PendingScores:
        """Score the completions of a question when the result is called, unless ``watch`` gives up."""
        score = watch.score if watch else score_group
        return partial(score, self._attempt, self._names, question, completions)


Scorer: TypeAlias = RewardPool | RewardsHere
"""Scores the completions of a question."""


@contextmanager
def scoring(
    training: TrainingConfig, registry: Registry, rewards: Sequence[Reward], context: Context
) -> Iterator[Scorer]:
    """Have rewards scored as the recipe says; at the end of the block no worker is left."""
    named = named_rewards(rewards)
    num_workers = _num_workers(training, context)
    if num_workers == 0:
        yield RewardsHere(named)
        return
    settings = WorkerSettings(
        plugin_files=tuple(origin.path for origin in registry.origins() if origin.path and origin.is_local),
        rewards=tuple((reward.config.type, reward.config.model_dump_json()) for reward in rewards),
        memory_bytes=training.reward_memory_bytes,
        cache_folder=context.cache_folder,
        run_folder=context.run_folder,
        seed=context.seed,
    )
    pool = RewardPool(settings, tuple(named), num_workers, training.reward_timeout_seconds)
    try:
        yield pool
    finally:
        pool.close()


def _num_workers(training: TrainingConfig, context: Context) -> int:
    """Count the workers of this process: by the machine's cores, unless the recipe says how many."""
    if training.reward_workers == 0:
        return 0
    if sys.platform != "linux":
        context.warn(
            f"training.reward_workers: worker processes need Linux, and this is {sys.platform!r}; rewards "
            "are scored in the run's own process, where nothing bounds their time or memory"
        )
        return 0
    if training.reward_workers is not None:
        return training.reward_workers
    num_runners = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_AUTOMATIC_WORKERS, len(os.sched_getaffinity(0)) // (2 * num_runners)))


class _ClosedError(Exception):
    """The pool is being closed: nobody waits for what is still being scored."""


@dataclass(slots=True)
class _Process:
    """A worker's process, with the keeper between us and it."""

    keeper: subprocess.Popen[bytes]
    control: socket.socket
    """The keeper kills the worker and all that it started when this is closed."""
    channel: Connection
    is_ready: bool = False


class _Worker:
    """A worker that is replaced when it hangs or dies; asked by one thread at a time."""

    def __init__(self, settings: bytes, timeout_seconds: float) -> None:
        self._settings = settings
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        """Between the threads that ask and replace, and the one that closes."""
        self._process: _Process | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start a process for it; it loads the rewards by itself.

        Linux ends it when the thread that calls this does, which must therefore be one of the pool's.
        """
        with self._lock:
            if self._is_closed:
                raise _ClosedError
            control, control_there = socket.socketpair()
            channel, channel_there = Pipe()
            numbers = control_there.fileno(), channel_there.fileno()
            worker = [sys.executable, "-c", START, str(numbers[1]), json.dumps(sys.path)]
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), *map(str, numbers), *worker],
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=2,  # What rewards print is talk.
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the run, which then ends its workers.
            )
            control_there.close()
            channel_there.close()
            self._process = _Process(keeper, control, channel)
        channel.send_bytes(self._settings)

    def close(self) -> None:
        """End the process, whatever it does, and start none again."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.control.close()
                self._process.keeper.wait()

    def ask(self, question: Question, completions: Sequence[Completion]) -> Reply:
        """Have some completions scored within the time.

        Raises:
            PluginError: a new process cannot load the rewards.
        """
        process = self._ready()
        try:
            process.channel.send_bytes(pickle.dumps((question, tuple(completions))))
            if not process.channel.poll(self._timeout_seconds):
                self._replace()
                error = f"no score within {self._timeout_seconds:g} s (training.reward_timeout_seconds)"
                return Reply(None, failure="timeout", error=error)
            return _reply(json.loads(process.channel.recv_bytes(MAX_REPLY_BYTES)), len(completions))
        except (EOFError, OSError, ValueError):
            status = self._replace(SECONDS_TO_END)
            return Reply(None, error=f"the process that scored it {_end_in_words(status)}")

    def _ready(self) -> _Process:
        """Give the process once it has loaded the rewards."""
        if self._process is None:
            self.start()
        process = self._process
        assert process is not None
        if process.is_ready:
            return process
        error = f"it did not start within {SECONDS_TO_START:g} s"
        try:
            if process.channel.poll(SECONDS_TO_START):
                error = str(json.loads(process.channel.recv_bytes(MAX_REPLY_BYTES))["error"])
        except (EOFError, OSError):
            error = f"it {_end_in_words(self._replace(SECONDS_TO_END))}"
        if error:
            raise PluginError(
                f"reward: a worker process cannot start: {error}; give it more memory "
                "(training.reward_memory_bytes), or let rewards be scored without one "
                "(training.reward_workers=0)"
            )
        process.is_ready = True
        return process

    def _replace(self, patience_seconds: float = 0.0) -> int:
        """End the process and all that it started, start another, and give the exit status of the first.

        Args:
            patience_seconds: how long the process, which seems to have ended, may take to do so by itself.
        """
        process = self._process
        assert process is not None
        with suppress(subprocess.TimeoutExpired):
            process.keeper.wait(patience_seconds)
        process.control.close()
        status = process.keeper.wait()
        process.channel.close()
        self._process = None
        self.start()
        return status


def _reply(message: Mapping[str, Any], num_completions: int) -> Reply:
    """Read a worker's reply, in which nothing is to be trusted.

    Raises:
        ValueError: it is none; the worker is then replaced.
    """
    try:
        error, warnings, parts = message["error"], message["warnings"], message["parts"]
        scores = None if error else {name: list(map(_score, found)) for name, found in parts.items()}
        if scores and any(len(found) != num_completions for found in scores.values()):
            raise ValueError(f"{message!r} is no reply about {num_completions} completions")
        return Reply(scores, tuple(map(str, warnings)), error=str(error))
    except (KeyError, TypeError, AttributeError) as wrong:
        raise ValueError(f"{message!r} is no reply of a worker") from wrong


def _score(found: object) -> float | None:
    return None if found is None else float(str(found))


def _end_in_words(status: int) -> str:
    """Say how a process ended, given a shell's exit status."""
    number = -status if status < 0 else status - 128
    found = [one.name for one in signal.Signals if one == number]
    return f"died of {found[0]}" if found else f"ended with status {status}"
