"""A process that scores completions: it loads the rewards as the run does, then answers until it is killed.

It imports no torch, sees no GPU and has bounded memory. Requests are pickles of our own records, which the
run sends; replies are JSON, because nothing that comes from here may be run there.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dteframe.contracts import Context, Reward
from dteframe.engine import calls
from dteframe.engine.reward_keeper import children_of
from dteframe.engine.scoring import Reply, attempt_with, named_rewards
from dteframe.plugin_sources import BUILT_IN
from dteframe.registry import load_registry

FIRST_TO_BE_KILLED = "1000"
"""Linux's score of a process that is ended before all others where memory runs out."""

OBJECTS_BETWEEN_COLLECTIONS = 10_000
"""Python's default, 700, takes a twentieth of the time that comparing expressions takes."""
SECONDS_TO_END = 0.2
"""For processes that scoring has started, once it is over."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker starts with."""

    plugin_files: tuple[Path, ...]
    """Local plugins of the run."""
    rewards: tuple[tuple[str, str], ...]
    """Type and options, as JSON, of each reward of the recipe."""
    memory_bytes: int
    cache_folder: Path
    run_folder: Path
    seed: int


def serve(channel_number: int) -> None:
    """Answer requests on a file descriptor until its other end is closed."""
    channel = Connection(channel_number)
    settings: WorkerSettings = pickle.loads(channel.recv_bytes())
    _limit(settings.memory_bytes)
    warnings: list[str] = []
    try:
        rewards = _started(settings, warnings)
    except Exception as error:  # noqa: BLE001  # a plugin may raise anything
        _send(channel, {"error": f"{type(error).__name__}: {error}"})
        return
    attempt = attempt_with(named_rewards(rewards), warnings)
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    process, kept = os.getpid(), set(children_of(os.getpid()))
    _send(channel, {"error": ""})
    while True:
        try:
            request = channel.recv_bytes()
        except EOFError:
            return
        question, completions = pickle.loads(request)
        try:
            reply = attempt(question, completions)
        except KeyboardInterrupt:  # Raised by a reward: people's own does not come here.
            reply = Reply(None, error="reward raised KeyboardInterrupt")
        if os.getpid() != process:
            os._exit(0)  # A fork that came back from the reward: the worker itself replies.
        _send(channel, _as_json(_without_strays(reply, kept)))


def _limit(memory_bytes: int) -> None:
    """Bound the memory, leave no core files, and be the first to go where the machine's memory runs out."""
    highest = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if highest == resource.RLIM_INFINITY else min(memory_bytes, highest)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text(FIRST_TO_BE_KILLED)


def _started(settings: WorkerSettings, warnings: list[str]) -> list[Reward]:
    """Build the recipe's rewards from the same plugins as the run."""
    built_in = [name for name in BUILT_IN if name.startswith("dteframe.rewards.")]
    registry = load_registry(settings.plugin_files, built_in=built_in)
    context = Context(
        cache_folder=settings.cache_folder,
        run_folder=settings.run_folder,
        device="cpu",
        seed=settings.seed,
        progress=lambda what, done, total: None,
        warn=warnings.append,
    )
    rewards: list[Reward] = []
    for name, options in settings.rewards:
        registered = registry.get("reward", name)
        reward = registered.component(registered.config.model_validate_json(options), context)
        assert isinstance(reward, Reward)
        with calls.running(reward):
            reward.start()
        rewards.append(reward)
    return rewards


def _without_strays(reply: Reply, kept: set[int]) -> Reply:
    """Kill processes that scoring has left running, orphans too, and call that a failure."""
    strays = (set(children_of(os.getpid())) - kept) | (set(children_of(os.getppid())) - {os.getpid()})
    running = _still_running(strays, SECONDS_TO_END)
    if not running:
        return reply
    for child in running:
        with suppress(ProcessLookupError):  # It has just ended by itself.
            os.kill(child, signal.SIGKILL)
    _still_running(running, SECONDS_TO_END)
    error = f"scoring left {len(running)} processes running; they were killed"
    return reply if reply.error else Reply(None, reply.warnings, error=error)


def _still_running(processes: set[int], patience_seconds: float) -> set[int]:
    """Wait a moment for processes to end, and give those that have not."""
    deadline = time.monotonic() + patience_seconds
    while running := {process for process in processes if not _has_ended(process)}:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.001)
    return running


def _has_ended(process: int) -> bool:
    """Whether a process is gone or waits to be buried; buries a child of this one."""
    with suppress(ChildProcessError):  # It is none: the keeper buries orphans.
        if os.waitpid(process, os.WNOHANG)[0]:
            return True
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def _as_json(reply: Reply) -> dict[str, Any]:
    return {"parts": reply.parts, "warnings": reply.warnings, "error": reply.error}


def _send(channel: Connection, message: dict[str, Any]) -> None:
    channel.send_bytes(json.dumps(message).encode())
