"""Scores of forecasts, with intervals: correlation, errors, likelihood, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dteframe.beta_binomial import log_likelihood, parameters
from dteframe.experiments.ceiling import Ceiling, ceiling_of
from dteframe.experiments.replay_trace import Forecasts

NUM_RESAMPLES = 400
"""Bootstrap samples of an interval."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that an interval is made of."""
SURELY = 1e-3
"""Means are kept this far from 0 and 1 in the likelihood: one surprise would be infinitely bad."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number and its 95 % interval; the questions are what the bootstrap draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """How good forecasts of some kind of questions are."""

    num_forecasts: int
    pearson: Score | None
    """Of predicted and measured rates; None where either does not vary."""
    spearman: Score | None
    brier: Score
    """Mean squared difference to the measured rates."""
    nll_nats: Score
    """Of the estimate's Beta distribution, per rollout."""
    slope: Score | None
    """Of measured on predicted rates: 1 is calibrated, less is over-confident."""
    ceiling: Ceiling | None
    """What a perfect estimator would score here; None where groups are single rollouts."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Forecasts of similar rates, for a reliability diagram."""

    predicted: float
    measured: float
    num_forecasts: int


def scores_of(
    forecasts: Sequence[Forecasts], kept: Callable[[Forecasts], np.ndarray], seed: int
) -> Scores | None:
    """Score the forecasts that ``kept`` marks, over all replays together; None if there are none."""
    parts = [(item, kept(item)) for item in forecasts]
    question, mean, evidence, successes, trials = (
        np.concatenate([getattr(item, name)[mask] for item, mask in parts])
        for name in ("question", "mean", "evidence", "successes", "trials")
    )
    if len(question) == 0:
        return None
    rates = successes / trials
    first, second = parameters(np.clip(mean, SURELY, 1 - SURELY), evidence)
    nll = -log_likelihood(first, second, successes, trials) / trials
    ranks = _ranks(mean), _ranks(rates)
    ones = np.ones(len(mean))
    columns = [ones, nll, (mean - rates) ** 2]
    for one, other in ((mean, rates), ranks):
        columns += [one, other, one * one, other * other, one * other]
    size = int(question.max()) + 1
    sums = np.stack([np.bincount(question, column, size) for column in columns])
    sums = sums[:, sums[0] > 0]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), NUM_RESAMPLES)
    resampled = sums @ weights.T
    whole = sums.sum(axis=1)
    return Scores(
        num_forecasts=len(question),
        pearson=_score(lambda total: _correlation(total[0], total[3:8]), whole, resampled),
        spearman=_score(lambda total: _correlation(total[0], total[8:13]), whole, resampled),
        brier=_certain(_score(lambda total: total[2] / total[0], whole, resampled)),
        nll_nats=_certain(_score(lambda total: total[1] / total[0], whole, resampled)),
        slope=_score(lambda total: _slope(total[0], total[3:8]), whole, resampled),
        ceiling=ceiling_of(successes, trials),
    )


def reliability(forecasts: Sequence[Forecasts], num_bins: int = 10) -> tuple[Bin, ...]:
    """Sort forecasts into equal parts of [0, 1] and compare predicted with measured rates."""
    mean = np.concatenate([item.mean for item in forecasts])
    rates = np.concatenate([item.successes / item.trials for item in forecasts])
    place = np.minimum((mean * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = place == number
        if inside.any():
            bins.append(Bin(float(mean[inside].mean()), float(rates[inside].mean()), int(inside.sum())))
    return tuple(bins)


def mean_with_interval(values: Float[np.ndarray, "items"], seed: int) -> Score:
    """Average, with a bootstrap interval over the items."""
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(drawn, INTERVAL)
    return Score(float(values.mean()), float(low), float(high))


def _score(
    figure: Callable[[np.ndarray], np.ndarray], whole: np.ndarray, resampled: np.ndarray
) -> Score | None:
    value = float(figure(whole[:, None])[0])
    if not np.isfinite(value):
        return None
    low, high = np.nanpercentile(figure(resampled), INTERVAL)
    return Score(value, float(low), float(high))


def _certain(score: Score | None) -> Score:
    assert score is not None, "a mean of finite numbers is finite"
    return score


def _correlation(count: np.ndarray, sums: np.ndarray) -> np.ndarray:
    one, other, one_squared, other_squared, product = sums / count
    variances = (one_squared - one**2) * (other_squared - other**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variances > 1e-18, (product - one * other) / np.sqrt(variances), np.nan)


def _slope(count: np.ndarray, sums: np.ndarray) -> np.ndarray:
    one, other, one_squared, _, product = sums / count
    variance = one_squared - one**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 1e-12, (product - one * other) / variance, np.nan)


def _ranks(values: Float[np.ndarray, "items"]) -> Float[np.ndarray, "items"]:
    """Rank from 0 to 1; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: Int[np.ndarray, "values"] = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[places] / max(len(values) - 1, 1))
