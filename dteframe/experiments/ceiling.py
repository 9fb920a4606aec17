"""What a perfect estimator could score: one that knows every success rate, but not the chance in rollouts.

The distribution of the true rates is estimated from the counts by maximum likelihood on a grid of rates; what
follows is the expectation under it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dteframe.engine.agreement import brier_floor, pearson_ceiling

GRID = np.linspace(0.0, 1.0, 101)
"""Rates that the distribution may hold."""
NUM_ITERATIONS = 500


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Scores of an estimator that knows all true rates, on these counts."""

    pearson: float
    brier: float
    """Against measured rates: what the chance in them costs."""
    nll_nats: float
    """Per rollout."""


def ceiling_of(successes: Int[np.ndarray, "groups"], trials: Int[np.ndarray, "groups"]) -> Ceiling | None:
    """Estimate the ceiling, or give None where single rollouts cannot tell chance from difference.

    None too where all measured rates are equal.
    """
    floor, pearson = brier_floor(successes, trials), pearson_ceiling(successes, trials)
    if floor is None or pearson is None:
        return None
    weights = distribution_of_rates(successes, trials)
    inner = GRID[1:-1]
    entropy = np.zeros_like(GRID)
    entropy[1:-1] = -(inner * np.log(inner) + (1 - inner) * np.log(1 - inner))
    return Ceiling(pearson, floor, float(weights @ entropy))


def best_informative_fraction(
    successes: Int[np.ndarray, "groups"], trials: Int[np.ndarray, "groups"], fraction: float
) -> float:
    """Give the share of informative groups if the best ``fraction`` of the questions were chosen.

    Best means by true rates; groups have as many rollouts as the typical group here.
    """
    weights = distribution_of_rates(successes, trials)
    size = int(np.median(trials))
    chance = 1 - GRID**size - (1 - GRID) ** size
    order = np.argsort(-chance)
    before = np.cumsum(weights[order]) - weights[order]
    taken = np.clip(fraction - before, 0.0, weights[order])
    return float(taken @ chance[order] / taken.sum())


def distribution_of_rates(
    successes: Int[np.ndarray, "groups"], trials: Int[np.ndarray, "groups"]
) -> Float[np.ndarray, "rates"]:
    """Fit the distribution of true rates on ``GRID`` under which the counts are likeliest (EM).

    Source: Laird, Nonparametric maximum likelihood estimation of a mixing distribution, JASA 1978.
    """
    pairs, counts = np.unique(np.stack([successes, trials]), axis=1, return_counts=True)
    solved, failed = pairs[0][:, None], (pairs[1] - pairs[0])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(solved > 0, solved * np.log(GRID), 0.0)
        logs += np.where(failed > 0, failed * np.log1p(-GRID), 0.0)
    likelihood = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights = np.full(len(GRID), 1 / len(GRID))
    for _ in range(NUM_ITERATIONS):
        joint = likelihood * weights
        weights = counts @ (joint / joint.sum(axis=1, keepdims=True)) / counts.sum()
    return np.asarray(weights)
