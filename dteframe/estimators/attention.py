"""The estimator of the DOTS paper: attention from every question to a few that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    Component,
    Estimator,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)
from dteframe.estimators.attention_prediction import AttentionOptions, AttentionPredictor
from dteframe.records import State

NEWEST_PLAN_PRIOR_ROLLOUTS = 8.0
"""Of ``prior_rollouts: null`` where the newest plan's references alone count: they may be too few for their
errors to say much."""


class AttentionConfig(AttentionOptions):
    """Options of ``attention``."""

    type: Literal["attention"] = "attention"
    prior_rollouts: float | None = Field(default=None, gt=0)
    """Rollouts that the prediction counts for where a question was measured itself (kappa). null: 8 where the
    references are the newest plan's alone; else what their leave-one-out errors say that a prediction is
    worth."""


@final
class AttentionEstimator(Estimator):
    """Predict success rates by attention over reference questions that were measured lately.

    With ``references: rolled_out`` the reference set is what was observed with purpose ``reference`` under
    the newest policy version that has such observations; with a half-life earlier ones count too, by what is
    left of them. Counts of training groups are not used: the update that follows them has outdated them
    before the next prediction. With ``references: training`` nothing is rolled out: every group is a
    reference, its counts halve with every half-life, and it weighs by what is left.

    References are predicted from the others, and their own counts are blended in: (kappa * prediction +
    successes) / (kappa + trials). Before the first reference every mean is 0.5 with evidence 0.

    ``evidence`` is one number for all unmeasured questions, from the references' leave-one-out errors (see
    ``prediction_evidence``), and that number plus the trials for measured ones.

    Figures, all over the references: ``leave_one_out_pearson`` (left out where the rates or the predictions
    are all equal) and ``leave_one_out_brier`` of the predictions before the line is applied;
    ``recalibration_slope``, ``recalibration_intercept`` and ``recalibration_unlimited_slope`` of the line;
    ``score_temperature``. Where attention is nearly flat, a reference's prediction is the mean of the others,
    which falls as its own rate rises: a correlation near -1 means that the embeddings tell nothing.

    Source: DOTS, arXiv:2506.05316, 4.1 and App. C.1. The leave-one-out fit, the blending with own counts, the
        evidence, attention without an adapter's head and training groups as references are ours.
    """

    config: AttentionConfig

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Embed the pool, and pass it through the adapters once: both stay as they are in the whole run."""
        self._predictor = AttentionPredictor(self.config, questions, encode_with_policy, self.context)

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Draw ``reference_size`` questions uniformly without replacement, if they are to be rolled out."""
        return self._predictor.draw(rng)

    def observe(self, observation: Observation) -> None:
        """Count the successes and trials of references."""
        self._predictor.observe(observation)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Attend, calibrate, correct by the line, and blend in own counts."""
        ids = self._predictor.index.ids
        predicted = self._predictor.predict(policy_version)
        if predicted is None:
            return SuccessEstimate(ids, np.full(len(ids), 0.5), np.zeros(len(ids)))
        mean, evidence = predicted.mean, np.full(len(ids), predicted.evidence)
        references, prior = predicted.references, self.config.prior_rollouts
        if prior is None:
            prior = NEWEST_PLAN_PRIOR_ROLLOUTS if self.config.looks_at_newest_plan else predicted.evidence
        own = references.positions
        mean[own] = (prior * mean[own] + references.successes) / (prior + references.trials)
        evidence[own] += references.trials
        return SuccessEstimate(ids, mean, evidence, predicted.figures)

    def state_dict(self) -> State:
        """Give the measurements."""
        return self._predictor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back.

        Raises:
            ValueError: the embeddings are not those of the checkpoint.
        """
        self._predictor.load_state_dict(state)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [AttentionEstimator]
