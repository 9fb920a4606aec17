"""See if a recipe resumes exactly: the same run straight and with stops, each part in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from dteframe.engine.checkpoint_folder import checkpoints_of
from dteframe.errors import DTEFrameError
from dteframe.hookspecs import hookimpl
from dteframe.plugin_sources import BUILT_IN
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry
from dteframe.reports import EvaluationReport, GroupsReport, PlanReport, StepReport
from dteframe.trackers.jsonl import FILE_NAMES

Moment: TypeAlias = Literal["planned", "scored", "evaluated", "finished"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
OF_THE_CLOCK = ("_seconds", "_per_second", "_bytes", "_utilization")
"""Ends of the names of metrics that the clock and the machine decide."""
PRELOADED = ["dteframe.engine.run", *BUILT_IN, "pyarrow.parquet", "pandas", "rich.progress"]
"""What takes long to import: once for all parts. pyarrow imports pandas where it is installed."""


@dataclass(frozen=True, slots=True)
class StopAt:
    """Where a run is stopped: the first such moment of a step, or of the next one that has it."""

    step: int
    moment: Moment

    @classmethod
    def parsed(cls, text: str) -> StopAt:
        """Read ``3:scored``.

        Raises:
            DTEFrameError: it is no such thing.
        """
        step, _, moment = text.partition(":")
        if not step.isdigit() or moment not in MOMENTS:
            raise DTEFrameError(
                f"--stop {text!r}: write a step and one of {', '.join(MOMENTS)}, as in 3:scored"
            )
        return cls(int(step), moment)

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{self.step}:{self.moment}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run that was stopped is the one that was not."""

    same: bool
    first_difference: str | None
    """Where, and both values."""
    steps: int
    stops: tuple[str, ...]
    """Those that came about."""
    resumed_from: tuple[str, ...]
    """After each of them: a checkpoint, or ``the start``."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run up to its end or its stop; what a process of its own is told."""

    recipe: Path
    overrides: tuple[str, ...]
    plugins: tuple[Path, ...] | None
    runs: Path
    stop: StopAt | None
    resume: bool


def verify_resume(part: Part, steps: int, stops: Sequence[StopAt], tell: Callable[[str], None]) -> Verdict:
    """Run a recipe straight and again with stops, and compare weights, state, metrics and rollouts.

    Args:
        part: recipe, overrides and plugins, and where the run folders ``straight`` and ``stopped`` go.
        steps: of each run.
        stops: in their order.
        tell: is told how far it is.

    Raises:
        DTEFrameError: a run fails.
    """
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    straight = Part(part.recipe, (*part.overrides, "name=straight"), part.plugins, part.runs, None, False)
    tell(f"{steps} steps straight")
    _do(straight, processes)
    came_about: list[str] = []
    resumed_from: list[str] = []
    folder = part.runs / "stopped"
    for stop in [*stops, None]:
        if came_about:
            whole = checkpoints_of(folder)
            resumed_from.append(whole[0].name if whole else "the start")
        tell(f"resumed from {resumed_from[-1]}" if resumed_from else "the same with stops")
        overrides = (*part.overrides, "name=stopped")
        if not _do(Part(part.recipe, overrides, part.plugins, part.runs, stop, bool(came_about)), processes):
            break
        came_about.append(str(stop))
    difference = first_difference(part.runs / "straight", folder)
    return Verdict(difference is None, difference, steps, tuple(came_about), tuple(resumed_from))


def first_difference(one: Path, other: Path) -> str | None:
    """Compare two run folders but for what the clock decides; say the first thing that differs, or None.

    Weights and the state of the learner and of all components are compared bit for bit, as their last
    checkpoints have them.
    """
    for name in FILE_NAMES:
        difference = _difference(_rows(one / name), _rows(other / name), name)
        if difference is not None:
            return difference
    last = checkpoints_of(one)[0].name
    ours, theirs = (_state(folder / "checkpoints" / last) for folder in (one, other))
    difference = _difference(ours, theirs, f"checkpoints/{last}")
    return difference or _difference(_weights(one / "policy"), _weights(other / "policy"), "policy")


def _do(part: Part, processes: ForkServerContext) -> bool:
    """Do a part in a process of its own; say whether it was stopped."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_in_process, args=(part, theirs))
    process.start()
    theirs.close()
    try:
        how, text = ours.recv()
    except EOFError:
        process.join()
        how, text = "failed", f"its process ended with exit code {process.exitcode}"
    process.join()
    if how == "failed":
        raise DTEFrameError(f"{part.recipe}: the run failed: {text}")
    return bool(how == "stopped")


def _in_process(part: Part, answer: Connection) -> None:
    from dteframe.engine.run import run_recipe

    try:
        registry = load_registry(part.plugins, near=part.recipe)
        loaded = load_recipe(part.recipe, part.overrides, registry)
        if part.stop is not None:
            registry.hooks.register(_Stopper(part.stop))
        run_recipe(loaded, registry, part.runs, part.resume)
        answer.send(("finished", ""))
    except KeyboardInterrupt:
        answer.send(("stopped", ""))
    except Exception as error:  # noqa: BLE001  # whatever it is, the other process tells it
        notes = getattr(error, "__notes__", [])
        answer.send(("failed", "\n".join([f"{type(error).__name__}: {error}", *notes])))


class _Stopper:
    """Ends the run at a moment, as Ctrl-C would."""

    def __init__(self, stop: StopAt) -> None:
        self._stop = stop

    @hookimpl
    def dteframe_plan_made(self, plan: PlanReport) -> None:
        self._at("planned", plan.step)

    @hookimpl
    def dteframe_groups_scored(self, groups: GroupsReport) -> None:
        self._at("scored", groups.step)

    @hookimpl
    def dteframe_evaluated(self, step: int, evaluation: EvaluationReport) -> None:
        self._at("evaluated", step)

    @hookimpl
    def dteframe_step_finished(self, report: StepReport) -> None:
        self._at("finished", report.step)

    def _at(self, moment: Moment, step: int) -> None:
        if moment == self._stop.moment and step >= self._stop.step:
            raise KeyboardInterrupt


def _rows(path: Path) -> list[Any]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [_without_clock(json.loads(line)) for line in file]


def _without_clock(value: Any) -> Any:
    """Leave out what the clock decides."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without_clock(item)
        for key, item in value.items()
        if not key.endswith(OF_THE_CLOCK) and key not in ("seconds", "bytes")
    }


def _state(checkpoint: Path) -> dict[str, Any]:
    """Give everything on a checkpoint but what trackers keep: where their files end depends on the clock."""
    from dteframe.engine.state_files import read_state

    components = read_state(checkpoint, "components")["states"]
    return {
        "components": {name: state for name, state in components.items() if not name.startswith("tracker.")},
        "progress": _without_clock(read_state(checkpoint, "progress")),
        "learner": read_state(checkpoint, "learner"),
        "weights": [_weights(checkpoint / name) for name in ("policy", "adapter", "learner")],
    }


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _bytes(values: Any) -> bytes:
    import torch

    return bytes(torch.as_tensor(values).contiguous().reshape(-1).view(torch.uint8).numpy())


def _difference(one: Any, other: Any, where: str) -> str | None:
    """Find the first place where two trees differ."""
    import numpy as np
    import torch

    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return f"{where}: has {sorted(one.keys() ^ other.keys())!r} on one side only"
        pairs = [(f"{where}: {key}", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where}: {len(one)} straight, {len(other)} with stops"
        pairs = [(f"{where}[{place}]", *values) for place, values in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor | np.ndarray) and isinstance(other, type(one)):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        return None if same else f"{where}: tensors differ"
    else:
        same = type(one) is type(other) and (one == other or (one != one and other != other))
        return None if same else f"{where}: {one!r} straight, {other!r} with stops"
    return next((found for path, ours, theirs in pairs if (found := _difference(ours, theirs, path))), None)
