"""Time to target: when a curve of evaluations first reaches a level, and how two arms' times compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

PAPER_HALF_LIFE = 40
"""Evaluations; of the curves of the DOTS paper (arXiv 2506.05316), reconstructed from its figures."""
NUM_RESAMPLES = 10_000
"""Bootstrap samples of an interval."""
STUDENT_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182}
"""By number of pairs, too few for a bootstrap: of three its 95 % interval is from least to greatest."""


def trailing_mean(values: Float[np.ndarray, "evaluations"], window: int) -> Float[np.ndarray, "evaluations"]:
    """Give the mean of each value and the ``window - 1`` before it; NaN where there are fewer.

    Args:
        values: in the order of evaluation.
        window: 1 or more; 1 gives the values themselves.
    """
    means = np.full(len(values), np.nan)
    for end in range(window, len(values) + 1):
        means[end - 1] = values[end - window : end].mean()
    return means


def paper_smoothing(values: Float[np.ndarray, "evaluations"]) -> Float[np.ndarray, "evaluations"]:
    """Smooth as the DOTS paper's figures do: a debiased exponential mean over all evaluations so far.

    It lags so far behind a rising curve that a target taken from it is easily reached: shown beside the
    trailing mean for comparison with the paper's figures, never instead of it.
    """
    weight = 1 - 2 ** (-1 / PAPER_HALF_LIFE)
    smoothed, mean, total = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        mean += weight * (value - mean)
        total += weight * (1 - total)
        smoothed[place] = mean / total
    return smoothed


def first_passage(
    curve: Float[np.ndarray, "evaluations"], costs: Float[np.ndarray, "evaluations"], target: float
) -> float | None:
    """Give the cost at which a curve first reaches a target, or None if it never does.

    Between the evaluation that is below and the next one that is not, cost is interpolated linearly. What the
    curve does afterwards does not count: a curve that falls again has reached the target.

    Args:
        curve: in the order of evaluation; leading NaN is skipped.
        costs: what was paid up to each evaluation; does not fall.
        target: in the curve's unit.
    """
    begin = int(np.argmax(~np.isnan(curve)))
    if np.isnan(curve).all():
        return None
    reached = np.flatnonzero(curve[begin:] >= target)
    if not len(reached):
        return None
    place = begin + int(reached[0])
    if place == begin:
        return float(costs[place])
    below, above = curve[place - 1], curve[place]
    share = (target - below) / (above - below)
    return float(costs[place - 1] + share * (costs[place] - costs[place - 1]))


def value_at(
    curve: Float[np.ndarray, "evaluations"], costs: Float[np.ndarray, "evaluations"], cost: float
) -> float:
    """Read a curve at a cost, linearly between evaluations, and hold its ends beyond them."""
    known = ~np.isnan(curve)
    return float(np.interp(cost, costs[known], curve[known]))


@dataclass(frozen=True, slots=True)
class Passage:
    """What one run paid until it reached the target."""

    cost: float
    """Of a run that never reached it: all that it paid, which is less than it would have needed."""
    is_censored: bool


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over paired seeds with its 95 % interval."""

    mean: float
    low: float | None
    """None with a single pair, which says nothing about the spread."""
    high: float | None


def paired_interval(differences: Sequence[float], seed: int = 0) -> Interval:
    """Give the mean of paired differences and the percentile interval of means over resampled seeds.

    Below five pairs it is Student's interval, which takes the differences for normally distributed.

    Raises:
        ValueError: there are no differences.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one pair of runs")
    if len(values) == 1:
        return Interval(float(values[0]), None, None)
    if len(values) in STUDENT_QUANTILES:
        half = STUDENT_QUANTILES[len(values)] * float(values.std(ddof=1)) / np.sqrt(len(values))
        return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def log_ratios(arm: Sequence[Passage], baseline: Sequence[Passage]) -> list[float]:
    """Compare costs of paired runs: below 0 the arm was cheaper; censored runs count at what they paid."""
    pairs = zip(arm, baseline, strict=True)
    return [float(np.log(ours.cost / theirs.cost)) for ours, theirs in pairs]


def saved(log_ratio: float) -> float:
    """Turn a log ratio of costs into the share saved: 0.65 is 65 % less, -1 is twice as much."""
    return float(1 - np.exp(log_ratio))
