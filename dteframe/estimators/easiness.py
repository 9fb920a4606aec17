"""How easy a question is for any policy: a linear function of its embedding, fitted to success rates.

The easiness is in logits: a policy's success rate is sigmoid(level + slope * easiness), where level and slope
are the policy's own and come from few measured questions. With slope 1 that is the Rasch model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num

from dteframe.estimators.references import ReferenceSet

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Strengths of the ridge penalty that are tried; rows have a mean square length of 1 per embedder."""
GAINS = (0.25, 0.5, 2.0, 4.0)
"""Factors of one embedder's columns that are tried beside 1 where there are several."""
HALF_TRUSTED = 8.0
"""Rollouts at which the chance in a rate weighs as much as what else tells policies and questions apart."""
SLOPE_DEVIATION = 0.5
"""Standard deviation of policies' slopes around 1, assumed where few questions are measured."""
LEVEL_DEVIATION = 3.0
"""Standard deviation of policies' levels around 0."""
NEVER = 1e30
"""Spread of a column that is the same for all questions: whatever it holds later counts nothing."""
NUM_NEWTON_STEPS = 12
"""Two parameters and a penalty: it converges in about six."""


@dataclass(frozen=True, slots=True)
class Easiness:
    """A linear function of embeddings."""

    centre: Float[np.ndarray, "width"]
    spread: Float[np.ndarray, "width"]
    """Columns are centred and divided by it; it carries the gain of the embedder that a column belongs to."""
    direction: Float[np.ndarray, "width"]

    def scaled(self, embeddings: Float[np.ndarray, "texts width"]) -> Float[np.ndarray, "texts width"]:
        """Centre and scale the columns."""
        return np.asarray((embeddings - self.centre) / self.spread, np.float32)

    def of(self, embeddings: Float[np.ndarray, "texts width"]) -> Float[np.ndarray, "texts"]:
        """Give the easiness of each text in logits."""
        return np.asarray(self.scaled(embeddings) @ self.direction, np.float64)


@dataclass(frozen=True, slots=True)
class FittedEasiness:
    """An easiness, and what it says of each question when that one's part of the data is left out."""

    easiness: Easiness
    left_out: Float[np.ndarray, "questions"]
    """In logits; from fits without the question's fold."""
    penalty: float
    gains: tuple[float, ...]
    """One per embedder."""


def fit_easiness(
    embeddings: Float[np.ndarray, "questions width"],
    widths: Sequence[int],
    successes: Num[np.ndarray, "policies questions"],
    trials: Num[np.ndarray, "policies questions"],
    folds: Int[np.ndarray, "questions"],
) -> FittedEasiness:
    """Fit questions' mean rates, less their policies' means, by ridge regression; then scale to logits.

    Penalty and gains are those with the least squared error on the folds that were left out, so the scale
    is: predictions of questions that were fitted to are too far from the mean.

    Args:
        embeddings: of all questions.
        widths: columns of each embedder, in order.
        successes: of each policy on each question.
        trials: 0 where a policy was not asked.
        folds: number of each question's fold; near duplicates should share one.
    """
    targets, weights = question_targets(successes, trials)
    parts = np.repeat(np.arange(len(widths)), widths)
    centre = np.average(embeddings, axis=0, weights=weights)
    deviation = np.sqrt(np.average((embeddings - centre) ** 2, axis=0, weights=weights))
    spread = np.where(deviation > 1e-9, deviation, NEVER) * np.sqrt(np.asarray(widths))[parts]
    rows = np.asarray((embeddings - centre) / spread, np.float32)
    search = _Search(rows, targets, weights, folds)
    gains, (loss, penalty, left_out) = np.ones(len(widths)), search.best(np.ones(len(parts)), PENALTIES)
    for part in range(1, len(widths)):
        for gain in GAINS:
            tried = np.where(np.arange(len(widths)) == part, gain, gains)
            found = search.best(tried[parts], [penalty])
            if found[0] < loss:
                gains, (loss, penalty, left_out) = tried, found
    if len(widths) > 1:
        loss, penalty, left_out = search.best(gains[parts], PENALTIES)
    direction = search.solution(gains[parts], penalty)
    _, scale = fit_policies(left_out, successes, trials)
    return FittedEasiness(
        Easiness(centre, spread / gains[parts], scale * direction),
        scale * left_out,
        penalty,
        tuple(gains.tolist()),
    )


def question_targets(
    successes: Num[np.ndarray, "policies questions"], trials: Num[np.ndarray, "policies questions"]
) -> tuple[Float[np.ndarray, "questions"], Float[np.ndarray, "questions"]]:
    """Give each question's mean rate above its policies' means, and how much it counts."""
    counts = trusted(trials)
    rates = successes / np.maximum(trials, 1e-12)
    asked = np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    level = (counts * rates).sum(axis=1, keepdims=True) / asked
    weights = counts.sum(axis=0)
    return (counts * (rates - level)).sum(axis=0) / np.maximum(weights, 1e-12), weights / weights.mean()


def trusted(trials: Num[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Say how much rates of so many rollouts count: 1 at most, half at 8."""
    return np.asarray(trials / (trials + HALF_TRUSTED))


class _Search:
    """Ridge regressions of one set of rows under many gains and penalties, each fold left out in turn."""

    def __init__(
        self,
        rows: Float[np.ndarray, "questions width"],
        targets: Float[np.ndarray, "questions"],
        weights: Float[np.ndarray, "questions"],
        folds: Int[np.ndarray, "questions"],
    ) -> None:
        self._rows, self._targets, self._weights, self._folds = rows, targets, weights, folds
        self._moments = []
        for fold in np.unique(folds):
            inside = folds == fold
            weighted = rows[inside] * weights[inside, None].astype(np.float32)
            self._moments.append((fold, weighted.T @ rows[inside], weighted.T @ targets[inside]))
        self._products = np.sum([products for _, products, _ in self._moments], axis=0)
        self._moment = np.sum([moment for _, _, moment in self._moments], axis=0)

    def best(
        self, gains: Float[np.ndarray, "width"], penalties: Sequence[float]
    ) -> tuple[float, float, Float[np.ndarray, "questions"]]:
        """Give the least loss, its penalty and the predictions of the questions left out."""
        found = []
        for penalty in penalties:
            predicted = np.empty(len(self._targets))
            for fold, products, moment in self._moments:
                inside = self._folds == fold
                direction = _ridge(self._products - products, self._moment - moment, gains, penalty)
                predicted[inside] = self._rows[inside] @ (gains * direction)
            loss = float(np.average((self._targets - predicted) ** 2, weights=self._weights))
            found.append((loss, penalty, predicted))
        return min(found, key=lambda item: item[0])

    def solution(self, gains: Float[np.ndarray, "width"], penalty: float) -> Float[np.ndarray, "width"]:
        """Fit to all questions; for rows that are multiplied by the gains."""
        return _ridge(self._products, self._moment, gains, penalty)


def _ridge(
    products: Float[np.ndarray, "width width"],
    moment: Float[np.ndarray, "width"],
    gains: Float[np.ndarray, "width"],
    penalty: float,
) -> Float[np.ndarray, "width"]:
    scaled = (gains[:, None] * products * gains).astype(np.float32)
    scaled[np.diag_indices(len(gains))] += np.float32(penalty)
    return np.asarray(np.linalg.solve(scaled, (gains * moment).astype(np.float32)), np.float64)


def fit_policies(
    easiness: Float[np.ndarray, "questions"],
    successes: Num[np.ndarray, "policies questions"],
    trials: Num[np.ndarray, "policies questions"],
) -> tuple[Float[np.ndarray, "policies"], float]:
    """Fit a level per policy and one scale of the easiness for all, by maximum likelihood."""
    counts = HALF_TRUSTED * trusted(trials)
    rates = successes / np.maximum(trials, 1e-12)
    level, scale = np.zeros(len(counts)), 1.0
    for _ in range(4 * NUM_NEWTON_STEPS):
        predicted = sigmoid(level[:, None] + scale * easiness)
        errors, curvature = counts * (rates - predicted), counts * predicted * (1 - predicted)
        level = level + errors.sum(axis=1) / (curvature.sum(axis=1) + LEVEL_DEVIATION**-2)
        predicted = sigmoid(level[:, None] + scale * easiness)
        errors, curvature = counts * (rates - predicted), counts * predicted * (1 - predicted)
        scale += float((errors * easiness).sum() / ((curvature * easiness**2).sum() + 1e-9))
    return level, scale


def fit_level_and_slope(
    easiness: Float[np.ndarray, "references"],
    rates: Float[np.ndarray, "references"],
    trials: Num[np.ndarray, "*sets references"],
) -> tuple[Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"]]:
    """Fit what is a policy's own to its rates on some questions, for several weightings at once.

    Maximises the likelihood under normal distributions of slope and level (``SLOPE_DEVIATION``,
    ``LEVEL_DEVIATION``); rollouts of one question count 8 at most, since questions differ in more than
    easiness.
    """
    counts = HALF_TRUSTED * trusted(trials)
    centre = np.where(counts.sum(axis=-1) > 0, (counts * easiness).sum(axis=-1), 0.0)
    centre = (centre / np.maximum(counts.sum(axis=-1), 1e-12))[..., None]
    offsets = easiness - centre  # level at the references' mean: nearly independent of the slope
    level, slope = np.zeros(counts.shape[:-1]), np.ones(counts.shape[:-1])
    for _ in range(NUM_NEWTON_STEPS):
        predicted = sigmoid(level[..., None] + slope[..., None] * offsets)
        errors, curvature = counts * (rates - predicted), counts * predicted * (1 - predicted)
        first = errors.sum(axis=-1) - level / LEVEL_DEVIATION**2
        second = (errors * offsets).sum(axis=-1) - (slope - 1) / SLOPE_DEVIATION**2
        a = curvature.sum(axis=-1) + LEVEL_DEVIATION**-2
        b = (curvature * offsets).sum(axis=-1)
        c = (curvature * offsets**2).sum(axis=-1) + SLOPE_DEVIATION**-2
        determinant = a * c - b * b
        level = level + np.clip((c * first - b * second) / determinant, -2.0, 2.0)
        slope = slope + np.clip((a * second - b * first) / determinant, -1.0, 1.0)
    return level - slope * centre[..., 0], slope


class Prior:
    """What easiness says of a policy's success rates, given its rates on some references."""

    def __init__(self, easiness: Float[np.ndarray, "references"], references: ReferenceSet) -> None:
        """Fit the policy's level and slope."""
        self.easiness, self._references = easiness, references
        self._level, self._slope = fit_level_and_slope(easiness, references.rates, references.trials)

    def of(self, easiness: Float[np.ndarray, "questions"]) -> Float[np.ndarray, "questions"]:
        """Predict the success rates of questions of that easiness."""
        return sigmoid(self._level + self._slope * easiness)

    def left_out(self, scores: Float[np.ndarray, "references references"]) -> Float[np.ndarray, "references"]:
        """Predict each reference from the others: level, slope and attended deviations are theirs alone.

        A single reference has no others and gets what level 0 and slope 1 say.
        """
        others = ~np.eye(len(scores), dtype=bool)
        trials = np.where(others, self._references.trials, 0.0)
        level, slope = fit_level_and_slope(self.easiness, self._references.rates, trials)
        prior = sigmoid(level[:, None] + slope[:, None] * self.easiness)
        own = np.diagonal(prior)
        if len(scores) == 1:
            return np.array(own)
        masked = np.where(others, scores, -np.inf)
        weights = np.exp(masked - masked.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.asarray(own + (weights * (self._references.rates - prior)).sum(axis=1))


def sigmoid(logits: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Turn logits into rates."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))
