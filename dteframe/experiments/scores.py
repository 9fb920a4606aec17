"""Scores of forecasts, with intervals: correlation, errors, likelihood, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dteframe.beta_binomial import log_likelihood, parameters
from dteframe.engine.agreement import ranks
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
class Differences:
    """One series of forecasts less another, over the same questions in the same rounds."""

    num_forecasts: int
    """Of each."""
    pearson: Score | None
    brier: Score
    nll_nats: Score
    """Per rollout; below 0 is better."""


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
    parts = [item.at(kept(item)) for item in forecasts]
    if not any(len(item.mean) for item in parts):
        return None
    rates, mean = _joined(parts, "successes") / _joined(parts, "trials"), _joined(parts, "mean")
    sums = _sums_by_question(parts, [*_products(mean, rates), *_products(ranks(mean), ranks(rates))])
    sums = sums[:, sums[0] > 0]
    whole, resampled = sums.sum(axis=1), sums @ _weights(sums.shape[1], seed).T
    return Scores(
        num_forecasts=len(mean),
        pearson=_score(lambda total: _correlation(total[0], total[3:8]), whole, resampled),
        spearman=_score(lambda total: _correlation(total[0], total[8:13]), whole, resampled),
        brier=_certain(_score(lambda total: total[2] / total[0], whole, resampled)),
        nll_nats=_certain(_score(lambda total: total[1] / total[0], whole, resampled)),
        slope=_score(lambda total: _slope(total[0], total[3:8]), whole, resampled),
        ceiling=ceiling_of(_joined(parts, "successes"), _joined(parts, "trials")),
    )


def differences_of(
    forecasts: Sequence[Forecasts], others: Sequence[Forecasts], *, are_seen: bool | None, seed: int
) -> Differences | None:
    """Compare two series of replays, forecast by forecast; None if they have none in common.

    Args:
        forecasts: one per seed; ``others`` likewise, of the same seeds.
        others: what is taken off.
        are_seen: only forecasts of questions that both had measured in an earlier round, or both had not;
            None is all.
        seed: of the bootstrap, which draws questions for both alike.
    """
    pairs = [_in_common(one, other, are_seen) for one, other in zip(forecasts, others, strict=True)]
    if not any(len(one.mean) for one, _ in pairs):
        return None
    sums = []
    for parts in zip(*pairs, strict=True):
        rates = _joined(parts, "successes") / _joined(parts, "trials")
        sums.append(_sums_by_question(parts, _products(_joined(parts, "mean"), rates)))
    kept = sums[0][0] > 0
    both = np.concatenate([one[:, kept] for one in sums])
    whole, resampled = both.sum(axis=1), both @ _weights(int(kept.sum()), seed).T
    half = len(both) // 2

    def difference(figure: Callable[[np.ndarray], np.ndarray]) -> Score | None:
        return _score(lambda total: figure(total[:half]) - figure(total[half:]), whole, resampled)

    return Differences(
        num_forecasts=int(whole[0]),
        pearson=difference(lambda total: _correlation(total[0], total[3:8])),
        brier=_certain(difference(lambda total: total[2] / total[0])),
        nll_nats=_certain(difference(lambda total: total[1] / total[0])),
    )


def _in_common(one: Forecasts, other: Forecasts, are_seen: bool | None) -> tuple[Forecasts, Forecasts]:
    """Keep the forecasts of questions that both predicted in the same round, in the same order."""
    size = 1 + max(int(item.question.max(initial=0)) for item in (one, other))
    ours, theirs = (item.round * size + item.question for item in (one, other))
    _, first, second = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    one, other = one.at(first), other.at(second)
    if are_seen is None:
        return one, other
    is_kept = (one.is_seen == are_seen) & (other.is_seen == are_seen)
    return one.at(is_kept), other.at(is_kept)


def _joined(parts: Sequence[Forecasts], name: str) -> np.ndarray:
    return np.concatenate([getattr(item, name) for item in parts])


def _sums_by_question(parts: Sequence[Forecasts], further: Sequence[np.ndarray]) -> np.ndarray:
    """Add up per question: forecasts, nats, squared errors, and what else is given."""
    question, mean, evidence, successes, trials = (
        _joined(parts, name) for name in ("question", "mean", "evidence", "successes", "trials")
    )
    first, second = parameters(np.clip(mean, SURELY, 1 - SURELY), evidence)
    nll = -log_likelihood(first, second, successes, trials) / trials
    columns = [np.ones(len(mean)), nll, (mean - successes / trials) ** 2, *further]
    return np.stack([np.bincount(question, column) for column in columns])


def _products(one: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    return [one, other, one * one, other * other, one * other]


def _weights(num_questions: int, seed: int) -> np.ndarray:
    """Draw how often each question is in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), NUM_RESAMPLES)


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
