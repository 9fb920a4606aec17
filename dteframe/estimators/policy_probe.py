"""A linear probe on embeddings and lengths of the questions, fitted anew to what was measured lately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dteframe import (
    Component,
    Estimator,
    EstimatorConfig,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)
from dteframe.estimators import attention_math
from dteframe.estimators.embedding_options import EmbeddingsConfig, PolicyEmbeddings
from dteframe.estimators.embeddings import embed, embedder_of
from dteframe.estimators.observed import PoolIndex
from dteframe.estimators.references import AgedReferences, ReferenceSet
from dteframe.records import State

PENALTIES = tuple(float(value) for value in np.logspace(-2, 4, 13))
"""Strengths of the penalty that are tried at each fit, in units of a reference's weight."""


class PolicyProbeConfig(EstimatorConfig):
    """Options of ``policy_probe``."""

    type: Literal["policy_probe"] = "policy_probe"
    embeddings: EmbeddingsConfig = PolicyEmbeddings()
    """What the probe reads: the policy's hidden states as they are before training, or another model's
    (``{type: sentence, path: ...}``, ``{type: lm, path: ...}``)."""
    length_knots: int = Field(default=8, ge=0)
    """Places at which the line through a question's length in characters may bend, spread so that as many
    questions lie between any two; 0: the probe does not read the length. What is beyond the policy's reach
    is often so from a certain length on, which no straight line can follow."""
    half_life: float = Field(default=200.0, gt=0)
    """Steps after which a measured group counts for half."""
    max_groups: int = Field(default=1024, ge=2)
    """Questions that the probe is fitted to at most: those with most left of them."""
    prior_rollouts: float = Field(default=1.0, gt=0)
    """Rollouts that the probe's word counts for where a question was measured itself."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Fit to few questions."""
        return cls(max_groups=16)


@final
class PolicyProbeEstimator(Estimator):
    """Predict success rates by ridge regression on embeddings and lengths; every group is a data point.

    The penalty is the one with the least leave-one-out error, which ridge regression has in closed form. The
    leave-one-out predictions also give the line that corrects all predictions, and the evidence. Own counts
    are blended in as ``attention`` does. Before two groups are measured every mean is 0.5 with evidence 0.

    Figures: ``leave_one_out_pearson``, ``leave_one_out_brier``, ``recalibration_slope``, ``penalty``.

    Source: the idea of a light head on hidden states, POISE, arXiv:2605.07579 (abstract alone was read).
        Ridge regression, lengths, ageing and frozen hidden states are ours: those of the first policy, so
        that nothing is computed anew in the run.
    """

    config: PolicyProbeConfig

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Embed the pool once."""
        self._index = PoolIndex(questions, "policy_probe")
        embedder = embedder_of(self.config.embeddings, encode_with_policy, self.context)
        texts = [question.text for question in questions]
        embeddings = embed(texts, embedder, self.context)
        attention_math.centre_and_normalise(embeddings)
        embeddings *= np.sqrt(embeddings.shape[1])  # Numbers of about 1, as those of the lengths.
        lengths = length_features([len(text) for text in texts], self.config.length_knots)
        self._features = np.concatenate([embeddings, lengths], axis=1)
        self._groups = AgedReferences(
            len(questions), self.config.max_groups, self.config.half_life, only_rolled_out=False
        )

    def observe(self, observation: Observation) -> None:
        """Take groups of either purpose in."""
        self._groups.observe(self._index.rows(observation), observation)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Fit, predict, correct by the line, and blend in own counts."""
        groups, size = self._groups.at(policy_version), len(self._index)
        if len(groups) < 2:
            return SuccessEstimate(self._index.ids, np.full(size, 0.5), np.zeros(size))
        fit = fit_ridge(self._features[groups.positions], groups)
        mean = fit.intercept + np.asarray(self._features @ fit.direction.astype(np.float32), np.float64)
        mean[groups.positions] = fit.left_out
        line = attention_math.fit_line(fit.left_out, groups.rates, groups.trials)
        mean, left_out = line.apply(mean), line.apply(fit.left_out)
        evidence = np.full(
            size, attention_math.prediction_evidence(left_out, groups.successes, groups.trials)
        )
        own, prior = groups.positions, self.config.prior_rollouts
        mean[own] = (prior * mean[own] + groups.successes) / (prior + groups.trials)
        evidence[own] += groups.trials
        figures = {
            "leave_one_out_brier": float(np.mean((fit.left_out - groups.rates) ** 2)),
            "recalibration_slope": line.slope,
            "penalty": fit.penalty,
        }
        correlation = attention_math.pearson(fit.left_out, groups.rates)
        if correlation is not None:
            figures["leave_one_out_pearson"] = correlation
        return SuccessEstimate(self._index.ids, mean, evidence, figures)

    def state_dict(self) -> State:
        """Give the measurements."""
        return {"groups": self._groups.state_dict(self._index)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back."""
        self._groups.load_state_dict(state["groups"], self._index)


def length_features(lengths: Sequence[int], num_knots: int) -> Float[np.ndarray, "pool knots"]:
    """Give a basis of the functions of length that are straight between knots: what is above each knot.

    Knots lie at quantiles; those that fall together count once. Columns have mean 0 and variance 1, and are
    float32.
    """
    values = np.asarray(lengths, np.float64)
    if not num_knots or values.min() == values.max():
        return np.zeros((len(values), 0), np.float32)
    knots = np.unique(np.quantile(values, np.linspace(0, 1, num_knots + 1)[:-1], method="lower"))
    above = np.maximum(0.0, values[:, None] - knots[knots < values.max()])
    return np.asarray((above - above.mean(axis=0)) / above.std(axis=0), np.float32)


class RidgeFit:
    """A linear function of features, and what it says of each data point when that is left out."""

    def __init__(
        self,
        direction: Float[np.ndarray, "width"],
        intercept: float,
        left_out: Float[np.ndarray, "groups"],
        penalty: float,
    ) -> None:
        """Keep what was fitted."""
        self.direction, self.intercept, self.left_out, self.penalty = direction, intercept, left_out, penalty


def fit_ridge(features: Float[np.ndarray, "groups width"], groups: ReferenceSet) -> RidgeFit:
    """Fit the groups' rates, each weighing by its trials, under the penalty of least leave-one-out error.

    The weighted fit with an intercept is an ordinary one on rows scaled by the square root of their weight.
    One decomposition serves every penalty: of the rows' inner products or of the features', whichever are
    fewer. Its projections P, with orthogonal columns of squared lengths v, fit P ((P' targets) / (v +
    penalty)).
    """
    weights = groups.trials / groups.trials.mean()
    roots = np.sqrt(weights)
    centre = np.average(features, axis=0, weights=weights).astype(np.float64)
    level = float(np.average(groups.rates, weights=weights))
    rows = (features - centre) * roots[:, None]
    targets = (groups.rates - level) * roots
    has_fewer_features = rows.shape[1] < rows.shape[0]
    values, vectors = np.linalg.eigh(rows.T @ rows if has_fewer_features else rows @ rows.T)
    values = np.maximum(values, 0.0)
    projections = rows @ vectors if has_fewer_features else vectors * np.sqrt(values)
    turned, squares = projections.T @ targets, projections**2
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in PENALTIES:
        fitted = projections @ (turned / (values + penalty))
        # The share of a point in its own fit; the intercept's own share comes on top.
        share = np.minimum(squares @ (1 / (values + penalty)) + weights / weights.sum(), 0.999)
        errors = (targets - fitted) / (1 - share)
        loss = float(np.mean(errors**2))
        if best is None or loss < best[0]:
            best = loss, penalty, groups.rates - errors / roots
    assert best is not None
    _, penalty, left_out = best
    if has_fewer_features:
        direction = vectors @ (turned / (values + penalty))
    else:
        direction = rows.T @ (vectors @ ((vectors.T @ targets) / (values + penalty)))
    return RidgeFit(direction, level - float(centre @ direction), left_out, penalty)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [PolicyProbeEstimator]
