"""The mathematics of the attention estimator in numpy: attention, calibration, leave-one-out fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Num

MIN_RATE = 1e-4
"""Success rates are clipped to [MIN_RATE, 1 - MIN_RATE] before a logarithm is taken."""
MIN_SPREAD = 1e-3
"""Below this standard deviation of the predictions no line is fitted to them."""
MIN_REFERENCES_OF_LINE = 16
"""With fewer references no line is fitted."""
SLOPE_LIMITS = (0.5, 2.0)
"""The line's slope is limited to this interval."""
EVIDENCE_LIMITS = (1.0, 64.0)
"""Rollouts that a prediction is worth, at least and at most: a reference set of a few hundred questions with
some rollouts each cannot show more."""
SCORES_AT_ONCE = 2**18
"""Attention scores that are in memory at a time: 1 MiB, which fits a core's cache."""
SAFE_SCORE = 60.0
"""Scores that cannot be larger, either way, need no maximum taken off before the exponential: exp(60) times
the rollouts of all references is far below float32's largest number, and exp(-60) far above its smallest."""
ROWS_AT_ONCE = 4096
"""Embeddings that are in memory at a time where a whole pool is changed."""


def attend(
    scores: Float[np.ndarray, "queries references"],
    rates: Float[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"] | None = None,
) -> Float[np.ndarray, "queries"]:
    """Average the references' success rates with softmax weights; -inf leaves a reference out.

    Each counts as often as it has ``trials``, or all alike.

    Source: DOTS, arXiv:2506.05316, 4.1; different trials are ours.
    """
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return _averages(weights, _columns(rates, trials, weights.dtype))


def attend_from(
    queries: Float[np.ndarray, "queries width"],
    longest_query: float,
    keys: Float[np.ndarray, "references width"],
    rates: Float[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"] | None = None,
) -> Float[np.ndarray, "queries"]:
    """Compute ``attend(queries @ keys.T, rates, trials)`` of any number of float32 queries.

    The scores are made and used a few rows at a time, in place, so that they stay in the processor's cache:
    most of the time goes into the product, the rest into the exponentials.

    Args:
        queries: what attends.
        longest_query: no query is longer; it says how large scores may be.
        keys: over the temperature.
        rates: of the references.
        trials: as for ``attend``.
    """
    rows = max(1, SCORES_AT_ONCE // len(keys))
    columns = _columns(rates, trials, np.float32)
    is_safe = longest_query * float(np.linalg.norm(keys, axis=1).max()) <= SAFE_SCORE
    scores = np.empty((min(rows, len(queries)), len(keys)), np.float32)
    mean = np.empty(len(queries))
    for first in range(0, len(queries), rows):
        part = scores[: len(queries) - first]
        np.matmul(queries[first : first + rows], keys.T, out=part)
        if not is_safe:
            part -= part.max(axis=1, keepdims=True)
        np.exp(part, out=part)
        mean[first : first + rows] = _averages(part, columns)
    return mean


def leave_one_out(
    scores: Float[np.ndarray, "references references"],
    temperatures: Sequence[float],
    rates: Float[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"] | None = None,
) -> Float[np.ndarray, "temperatures references"]:
    """Predict each reference from the others only, with the scores over each of the temperatures.

    The diagonal is masked before the softmax: taking the own share out of the finished average, (p - a y) /
    (1 - a), is unstable where a reference attends almost only to itself. A single reference has no others and
    gets 0.5.
    """
    if len(rates) == 1:
        return np.full((len(temperatures), 1), 0.5)
    masked = scores.copy()
    np.fill_diagonal(masked, -np.inf)
    masked -= masked.max(axis=1, keepdims=True)
    columns, weights = _columns(rates, trials, masked.dtype), np.empty_like(masked)
    predicted = np.empty((len(temperatures), len(rates)))
    for row, temperature in enumerate(temperatures):
        np.multiply(masked, masked.dtype.type(1 / temperature), out=weights)
        predicted[row] = _averages(np.exp(weights, out=weights), columns)
    return predicted


def _columns(
    rates: Float[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"] | None,
    dtype: npt.DTypeLike,
) -> Float[np.ndarray, "references 2"]:
    """Give what weights are multiplied with: successes and trials."""
    counted = np.ones(len(rates)) if trials is None else trials
    return np.stack([rates * counted, counted], axis=1).astype(dtype)


def _averages(
    weights: Float[np.ndarray, "queries references"], columns: Float[np.ndarray, "references 2"]
) -> Float[np.ndarray, "queries"]:
    sums = weights @ columns
    return np.asarray(sums[:, 0] / sums[:, 1], np.float64)


def rate_statistics(rates: Float[np.ndarray, "references"]) -> Float[np.ndarray, "2"]:
    """Give mean and population standard deviation of the references' success rates: the head's input."""
    return np.array([rates.mean(), rates.std()])


def leave_one_out_statistics(rates: Float[np.ndarray, "references"]) -> Float[np.ndarray, "references 2"]:
    """Give ``rate_statistics`` of all other references, for each; at least 2 references."""
    count = len(rates)
    centred = rates - rates.mean()  # keeps the difference of squares accurate
    mean = -centred / (count - 1)
    variance = (np.sum(centred**2) - centred**2) / (count - 1) - mean**2
    return np.stack([mean + rates.mean(), np.sqrt(np.maximum(variance, 0.0))], axis=1)


def calibrate(
    base: Float[np.ndarray, "queries"],
    scale: Float[np.ndarray, "#queries"],
    shift: Float[np.ndarray, "#queries"],
) -> Float[np.ndarray, "queries"]:
    """Compute sigmoid(scale * logit(base) + shift), with ``base`` clipped to [1e-4, 1 - 1e-4]."""
    clipped = np.clip(base, MIN_RATE, 1 - MIN_RATE)
    logits = scale * np.log(clipped / (1 - clipped)) + shift
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


@dataclass(frozen=True, slots=True)
class Line:
    """A linear correction of predicted success rates."""

    slope: float
    """Within ``SLOPE_LIMITS``."""
    intercept: float
    unlimited_slope: float
    """What least squares gave; near 0 where the predictions tell nothing."""

    def apply(self, rates: Float[np.ndarray, "questions"]) -> Float[np.ndarray, "questions"]:
        """Correct the rates and clip them to [0, 1]."""
        return np.clip(self.slope * rates + self.intercept, 0.0, 1.0)


def fit_line(
    predicted: Float[np.ndarray, "references"],
    measured: Float[np.ndarray, "references"],
    weights: Num[np.ndarray, "references"] | None = None,
) -> Line:
    """Fit measured success rates by least squares on leave-one-out predictions; all count alike by default.

    Returns:
        The identity for fewer than 16 references or predictions whose standard deviation is below 1e-3. The
        intercept belongs to the limited slope: the line goes through both means.

    Source: method of the released DOTS code (``teacher_utils.py``), which fits predictions that contain the
        reference's own label and so finds a slope where there is none; ours are leave-one-out.
    """
    if len(predicted) < MIN_REFERENCES_OF_LINE:
        return Line(1.0, 0.0, 1.0)
    centre, level = (float(np.average(values, weights=weights)) for values in (predicted, measured))
    offsets = predicted - centre
    variance = float(np.average(offsets**2, weights=weights))
    if variance < MIN_SPREAD**2:
        return Line(1.0, 0.0, 1.0)
    unlimited = float(np.average(offsets * (measured - level), weights=weights)) / variance
    slope = float(np.clip(unlimited, *SLOPE_LIMITS))
    return Line(slope, level - slope * centre, unlimited)


def log_likelihood(
    predicted: Float[np.ndarray, "references"],
    successes: Num[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"],
) -> float:
    """Give the log-likelihood of the counts in nats, up to a constant, with clipped rates."""
    clipped = np.clip(predicted, MIN_RATE, 1 - MIN_RATE)
    return float(np.sum(successes * np.log(clipped) + (trials - successes) * np.log1p(-clipped)))


def prediction_evidence(
    predicted: Float[np.ndarray, "references"],
    successes: Num[np.ndarray, "references"],
    trials: Num[np.ndarray, "references"],
) -> float:
    """Say how many rollouts a prediction is worth, from the leave-one-out errors.

    A Beta(m n, (1 - m) n) has variance m (1 - m) / (n + 1), so n = mean(m (1 - m)) / error - 1. The error is
    the mean squared difference to the measured rates, less the chance in those: y (1 - y) / (trials - 1),
    unbiased where a reference has at least 2 rollouts; where it has one, nothing is taken off. Limited to [1,
    64].
    """
    measured = successes / trials
    chance = np.where(trials > 1, measured * (1 - measured) / np.maximum(trials - 1, 1), 0.0)
    error = float(np.mean((measured - predicted) ** 2 - chance))
    spread = float(np.mean(predicted * (1 - predicted)))
    low, high = EVIDENCE_LIMITS
    return high if error * (high + 1) <= spread else max(spread / error - 1, low)


def pearson(first: Float[np.ndarray, "items"], second: Float[np.ndarray, "items"]) -> float | None:
    """Correlate two series; None where one of them is constant."""
    deviations = float(first.std()) * float(second.std())
    if deviations < 1e-12:
        return None
    return float(np.mean((first - first.mean()) * (second - second.mean())) / deviations)


def centre_and_normalise(embeddings: Float[np.ndarray, "texts width"]) -> None:
    """Take off the mean and scale every row to length 1, in place; a row equal to the mean becomes 0."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    for first in range(0, len(embeddings), ROWS_AT_ONCE):
        rows = embeddings[first : first + ROWS_AT_ONCE]
        centred = rows - mean
        lengths = np.linalg.norm(centred, axis=1, keepdims=True)
        typical = np.linalg.norm(rows, axis=1, keepdims=True)
        is_zero = lengths <= 1e-6 * typical  # float32 rounding, no direction of its own
        rows[:] = np.where(is_zero, 0.0, centred / np.where(is_zero, 1.0, lengths))
