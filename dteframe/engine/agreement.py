"""How well predicted success rates agree with measured ones."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Num

from dteframe.beta_binomial import log_likelihood, parameters

SURELY = 1e-3
"""Means are kept this far from 0 and 1 in likelihoods: one surprise would be infinitely bad."""


def pearson(predicted: Float[np.ndarray, "n"], measured: Float[np.ndarray, "n"]) -> float | None:
    """Correlate two series; None where either does not vary."""
    if len(predicted) < 2 or np.ptp(predicted) < 1e-12 or np.ptp(measured) < 1e-12:
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Rank from 0 to 1; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: Int[np.ndarray, "values"] = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[places] / max(len(values) - 1, 1))


def brier(predicted: Float[np.ndarray, "n"], measured: Float[np.ndarray, "n"]) -> float | None:
    """Average the squared difference; None for empty series."""
    return float(np.mean((predicted - measured) ** 2)) if len(predicted) else None


def brier_floor(successes: Num[np.ndarray, "n"], trials: Num[np.ndarray, "n"]) -> float | None:
    """Estimate the Brier score of the true rates: the chance in measured ones, y (1 - y) / (trials - 1).

    That is unbiased; None where single rollouts cannot tell chance from difference.
    """
    if len(trials) < 2 or trials.min() < 2:
        return None
    rates = successes / trials
    return float(np.mean(rates * (1 - rates) / (trials - 1)))


def pearson_ceiling(successes: Num[np.ndarray, "n"], trials: Num[np.ndarray, "n"]) -> float | None:
    """Estimate the correlation of the true rates with the measured ones.

    What chance leaves of the measured rates' variance is the true rates'. None where ``brier_floor`` is, and
    where all measured rates are equal.
    """
    floor = brier_floor(successes, trials)
    variance = 0.0 if floor is None else float((successes / trials).var())
    return None if floor is None or variance <= 0 else float(np.sqrt(max(1 - floor / variance, 0.0)))


def slope_with_error(
    predicted: Float[np.ndarray, "n"], measured: Float[np.ndarray, "n"]
) -> tuple[float | None, float | None]:
    """Fit measured on predicted rates by least squares: slope and its standard error.

    1 is calibrated, less is over-confident. None for fewer than 3 pairs or predictions that do not vary.
    """
    if len(predicted) < 3 or np.ptp(predicted) < 1e-12:
        return None, None
    offsets = predicted - predicted.mean()
    squares = float(offsets @ offsets)
    slope = float(offsets @ measured) / squares
    left = measured - measured.mean() - slope * offsets
    return slope, float(np.sqrt(left @ left / (len(predicted) - 2) / squares))


def nll_nats(
    mean: Float[np.ndarray, "n"],
    evidence: Float[np.ndarray, "n"],
    successes: Float[np.ndarray, "n"],
    trials: Float[np.ndarray, "n"],
) -> float:
    """Average the negative log-likelihood per rollout of groups under estimates; at least one group."""
    first, second = parameters(np.clip(mean, SURELY, 1 - SURELY), evidence)
    solved, tried = successes.astype(np.int64), trials.astype(np.int64)
    return float(np.mean(-log_likelihood(first, second, solved, tried) / trials))


def constant_nll_nats(successes: Float[np.ndarray, "n"], trials: Float[np.ndarray, "n"]) -> float:
    """Give the same of one who knows the mean rate of these very groups and nothing else."""
    mean = np.clip(successes.sum() / trials.sum(), SURELY, 1 - SURELY)
    rates = successes / trials
    return float(np.mean(-rates * np.log(mean) - (1 - rates) * np.log1p(-mean)))
