"""Read what runs wrote: how often their policy succeeded, and what they had paid by then."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float

from dteframe.errors import DTEFrameError
from dteframe.experiments.sweep_jobs import SWEEP_FILE, read_sweep_file
from dteframe.recipe.sweep_config import ComparisonConfig

COSTS = ("seconds", "cpu_seconds", "tokens", "rollouts", "steps")
"""In what costs are counted: training seconds, evaluation, loading and checkpoints apart; CPU-seconds of the
same; tokens and rollouts generated for training and for references; steps."""


@dataclass(frozen=True, slots=True)
class Series:
    """A figure of training steps, where there is one; a row for several steps bears the last one's number."""

    steps: Float[np.ndarray, "rows"]
    values: Float[np.ndarray, "rows"]

    def mean(self, last_step: float = math.inf) -> float:
        """Give the mean up to a step, the first row always among them; NaN without rows."""
        if not len(self.steps):
            return math.nan
        return float(self.values[self.steps <= max(last_step, self.steps[0])].mean())


@dataclass(frozen=True, slots=True)
class Curve:
    """One run, at its evaluations."""

    name: str
    arm: str
    pair: str
    """What the runs that are compared have in common, seeds apart: the variants of the other axes."""
    seed: int
    max_steps: int
    success_rates: Float[np.ndarray, "evaluations"]
    standard_error: float
    """Of a success rate, on average: over the questions that are held out."""
    costs: Mapping[str, Float[np.ndarray, "evaluations"]]
    """Paid before each evaluation, by unit (``COSTS``)."""
    seconds_by_stage: Mapping[str, Float[np.ndarray, "evaluations"]]
    """Wall-clock before each evaluation, by stage of a step; evaluation and loading too."""
    reference_tokens: Float[np.ndarray, "evaluations"]
    informative_fractions: Series
    """Of the fresh groups."""
    correlations: Series
    """Of what was predicted with what was measured."""

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.costs["steps"][-1] >= self.max_steps)


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs to be compared."""

    curves: tuple[Curve, ...]
    comparison: ComparisonConfig | None
    left_out: tuple[str, ...]
    """Runs that cannot be compared, each with the reason."""


def read_runs(paths: Sequence[Path]) -> Runs:
    """Read a sweep's folder, or single runs.

    Of a single run the name up to its last ``-s`` and number is the arm. Runs without evaluations, and those
    that are not complete, are left out and named.

    Raises:
        DTEFrameError: a path is neither; or sweeps differ in how they are to be compared.
    """
    curves: list[Curve] = []
    left_out: list[str] = []
    comparisons: list[ComparisonConfig | None] = []
    for path in paths:
        if (path / SWEEP_FILE).is_file():
            sweep = read_sweep_file(path / SWEEP_FILE)
            comparisons.append(sweep.comparison)
            axis = "" if sweep.comparison is None else sweep.comparison.axis
            for run in sweep.runs:
                others = [variant for name, variant in run.variants.items() if name != axis]
                arm = run.variants.get(axis, "-".join(run.variants.values()))
                _take(path / run.name, arm, "-".join(others) if axis else "", curves, left_out)
        elif (path / "recipe.yaml").is_file():
            arm = path.name.rpartition("-s")[0] or path.name
            _take(path, arm, "", curves, left_out)
        else:
            raise DTEFrameError(
                f"{path}: is no folder of a run (recipe.yaml) or a sweep ({SWEEP_FILE}); name one"
            )
    if any(comparison != comparisons[0] for comparison in comparisons):
        raise DTEFrameError(
            f"{', '.join(map(str, paths))}: they are to be compared in different ways; name one sweep"
        )
    return Runs(tuple(curves), comparisons[0] if comparisons else None, tuple(left_out))


def _take(folder: Path, arm: str, pair: str, curves: list[Curve], left_out: list[str]) -> None:
    """Read a run, or note why it cannot be compared."""
    if not (folder / "metrics.jsonl").is_file():
        left_out.append(f"{folder.name}: has not begun")
        return
    curve = _curve(folder, arm, pair)
    if curve is None:
        left_out.append(f"{folder.name}: has no evaluations (training.evaluate_every)")
    elif not curve.is_complete:
        steps = int(curve.costs["steps"][-1])
        left_out.append(f"{folder.name}: is not complete, its last evaluation is at step {steps}")
    else:
        curves.append(curve)


def _curve(folder: Path, arm: str, pair: str) -> Curve | None:
    """Read one run's metrics; None without evaluations.

    Raises:
        DTEFrameError: a file cannot be read; names it and the line.
    """
    path = folder / "metrics.jsonl"
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({str(key): value for key, value in row.items()})
        except (ValueError, AttributeError) as error:
            raise DTEFrameError(
                f"{path}:{number}: is no JSON object; delete the run's folder, or the line"
            ) from error
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        seed, max_steps = int(recipe["seed"]), int(recipe["training"]["max_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DTEFrameError(f"{folder / 'recipe.yaml'}: cannot be read ({reason}); restore it") from error
    places = [place for place, row in enumerate(rows) if "evaluation/success_rate" in row]
    if not places:
        return None
    stages = sorted(
        {key for row in rows for key in row if key.startswith("time/") and key != "time/step_seconds"}
    )
    return Curve(
        name=folder.name,
        arm=arm,
        pair=pair,
        seed=seed,
        max_steps=max_steps,
        success_rates=_column(rows, places, "evaluation/success_rate"),
        standard_error=float(_column(rows, places, "evaluation/standard_error").mean()),
        costs={
            "seconds": _column(rows, places, "cost/training_seconds"),
            "cpu_seconds": _column(rows, places, "cost/training_cpu_seconds"),
            "tokens": _column(rows, places, "cost/train_tokens")
            + _column(rows, places, "cost/reference_tokens"),
            "rollouts": _column(rows, places, "cost/train_rollouts")
            + _column(rows, places, "cost/reference_rollouts"),
            "steps": _column(rows, places, "step"),
        },
        seconds_by_stage={
            stage.removeprefix("time/").removesuffix("_seconds"): np.cumsum(
                [float(row.get(stage) or 0.0) for row in rows]
            )[places]
            for stage in stages
        },
        reference_tokens=_column(rows, places, "cost/reference_tokens"),
        informative_fractions=_series(rows, "answer/informative_fraction"),
        correlations=_series(rows, "answer/predicted_pearson"),
    )


def _column(
    rows: Sequence[Mapping[str, float | None]], places: Sequence[int], key: str
) -> Float[np.ndarray, "n"]:
    """Take a figure at the evaluations; NaN where it is missing."""
    return np.array([_number(rows[place].get(key)) for place in places])


def _series(rows: Sequence[Mapping[str, float | None]], key: str) -> Series:
    """Take a figure of every step that has it, but not of the evaluation before the first."""
    found = [row for row in rows if row.get("step") and row.get(key) is not None]
    return Series(_column(found, range(len(found)), "step"), _column(found, range(len(found)), key))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
