"""Checkpoints: everything that a run needs to go on, in a folder that is either whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from dteframe.contracts import Component
from dteframe.engine import calls
from dteframe.engine.checkpoint_folder import (
    BEST,
    CHECKPOINTS,
    fresh_folder,
    keep_newest,
    name_of,
    put_in_place,
    replace_file,
    write_manifest,
)
from dteframe.engine.out_of_memory import SMALLER_OPTIMIZER, memory_for
from dteframe.engine.progress import Progress
from dteframe.engine.setup import Setup
from dteframe.engine.shared_state import Load, Save, SavePolicy, shared_components, take_back
from dteframe.engine.state_files import read_state, write_state
from dteframe.errors import ResumeError


@final
class Finishing:
    """Finishes checkpoints while the run goes on, one after the other.

    Their files are written, so that nothing of the run is in use any more; hashing them, bringing them to the
    disk and giving the folder its name takes most of a checkpoint's time and needs no Python.
    """

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        """Take the thread that does it."""
        self._threads = threads
        self._pending: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Have a checkpoint finished; the one before must be."""
        self._pending = self._threads.submit(work)

    def look(self) -> None:
        """Raise what the checkpoint that is being finished failed with, if it has."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being finished; raise what it fails with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


@contextmanager
def finishing_checkpoints() -> Iterator[Finishing]:
    """Give what finishes checkpoints; at the end, however it comes, the last one is finished."""
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as threads:
        finishing = Finishing(threads)
        try:
            yield finishing
        finally:
            finishing.wait()


def save_checkpoint(setup: Setup, progress: Progress, finishing: Finishing) -> None:
    """Write ``checkpoints/step_000040``, say in ``checkpoints/best.json`` which is best, remove old ones.

    When this returns the files are written; ``finishing`` does the rest, and the checkpoint counts from then
    on.
    """
    finishing.wait()
    progress.note_checkpoint()
    folder = setup.context.run_folder / CHECKPOINTS / name_of(progress.step)
    with memory_for("checkpoint", "writing it", setup.context.device, SMALLER_OPTIMIZER):
        fresh = fresh_folder(folder)
        setup.together(Save(fresh))
        types = {name: component.config.type for name, component in _stateful(setup).items()}
        write_state(fresh, "components", {"types": types, "states": _component_states(setup)})
        state = {
            "pool": setup.pool.fingerprint(),
            "plan_sizes": _plan_sizes(setup),
            "progress": progress.state_dict(),
            "meter": setup.meter.state_dict(),
        }
        write_state(fresh, "progress", state)
    best = None if progress.best_step is None else folder.with_name(name_of(progress.best_step))
    told = None if best is None else {"checkpoint": best.name, "success_rate": progress.best_success_rate}
    limit = setup.recipe.training.save_total_limit

    def finish() -> None:
        write_manifest(fresh)
        put_in_place(fresh, folder)
        if told is not None:
            replace_file(folder.with_name(BEST), json.dumps(told) + "\n")
        keep_newest(folder, limit, best)

    finishing.begin(finish)


def save_policy(setup: Setup) -> None:
    """Write ``policy``, which plain transformers loads, and ``adapter``, which peft does, if there is one."""
    run_folder = setup.context.run_folder
    fresh = run_folder / ".policy.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    with memory_for("checkpoint", "writing the policy", setup.context.device, SMALLER_OPTIMIZER):
        setup.together(SavePolicy(fresh))
    for folder in sorted(fresh.iterdir()):
        put_in_place(folder, run_folder / folder.name)
    fresh.rmdir()


def load_checkpoint(setup: Setup, progress: Progress, folder: Path) -> None:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        ResumeError: the questions, or the weights below a LoRA adapter, are others than the checkpoint's.
    """
    state = read_state(folder, "progress")
    if state["pool"] != setup.pool.fingerprint():
        raise ResumeError(
            f"{folder}: the questions of dataset {setup.recipe.dataset.type!r} have changed since then "
            f"(now {len(setup.pool.train)} to train on, {len(setup.pool.evaluation)} held out); "
            "bring the data back, or give another name=... to start afresh"
        )
    written = read_state(folder, "components")
    states = {name: written["states"][name] for name in _unchanged(setup, written["types"])}
    shared = shared_components(setup.parts)
    setup.together(Load(folder, {name: state for name, state in states.items() if name in shared}))
    for name, component in _stateful(setup).items():
        if name in states and name not in shared:
            take_back(component, states[name])
    progress.load_state_dict(state["progress"])
    if state["plan_sizes"] != _plan_sizes(setup):
        progress.plan = None  # A fork of other sizes plans anew.
    setup.meter.load_state_dict(state["meter"])


def _unchanged(setup: Setup, types: Mapping[str, str]) -> list[str]:
    """Name the components that are what they were; those that a fork or new trackers bring begin afresh."""
    names = []
    for name, component in _stateful(setup).items():
        now = component.config.type
        if types.get(name) == now:
            names.append(name)
        elif component.kind != "tracker":
            setup.context.warn(
                f"{name} {now!r} begins afresh: the checkpoint has the state of {types.get(name)!r}"
            )
    return names


def _plan_sizes(setup: Setup) -> dict[str, int]:
    """Give the sizes that a plan is made for."""
    return {name: size for name, size in asdict(setup.arithmetic).items() if name != "max_steps"}


def _stateful(setup: Setup) -> Mapping[str, Component]:
    parts = setup.parts
    named: dict[str, Component] = {
        "estimator": parts.estimator,
        "selector": parts.selector,
        "replay": parts.replay,
    }
    named |= shared_components(parts)
    return named | {f"tracker.{tracker.config.type}": tracker for tracker in parts.trackers}


def _component_states(setup: Setup) -> dict[str, Any]:
    states = {}
    for name, component in _stateful(setup).items():
        with calls.running(component):
            states[name] = component.state_dict()
    return states
