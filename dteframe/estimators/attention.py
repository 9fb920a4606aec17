"""The estimator of the DOTS paper: attention from every question to a few that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Estimator,
    Observation,
    Question,
    SuccessEstimate,
    TextEncoder,
    hookimpl,
)
from dteframe.estimators.attention_prediction import AttentionOptions, AttentionPredictor
from dteframe.estimators.observed import PoolIndex
from dteframe.estimators.references import RolledOutReferences, TrainingReferences
from dteframe.records import State


class AttentionConfig(AttentionOptions):
    """Options of ``attention``."""

    type: Literal["attention"] = "attention"
    prior_rollouts: float = Field(default=8.0, gt=0)
    """Rollouts that the prediction counts for where a question was measured itself (kappa)."""


@final
class AttentionEstimator(Estimator):
    """Predict success rates by attention over reference questions that were measured lately.

    With ``references: rolled_out`` the reference set is what was observed with purpose ``reference`` under
    the newest policy version that has such observations. Counts of training groups are not used: the update
    that follows them has outdated them before the next prediction. With ``references: training`` nothing is
    rolled out: every group is a reference, its counts halve with every half-life, and it weighs by what is
    left.

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

    def __init__(self, config: AttentionConfig, context: Context) -> None:
        """Start without a pool."""
        super().__init__(config, context)
        self._references: RolledOutReferences | TrainingReferences

    def start(self, questions: Sequence[Question], encode_with_policy: TextEncoder) -> None:
        """Embed the pool, and pass it through the adapters once: both stay as they are in the whole run."""
        config = self.config
        self._index = PoolIndex(questions, "attention")
        self._predictor = AttentionPredictor(config, questions, encode_with_policy, self.context)
        if config.references == "rolled_out":
            self._references = RolledOutReferences(len(questions))
        else:
            self._references = TrainingReferences(
                len(questions), config.reference_size, config.reference_half_life
            )

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Draw ``reference_size`` questions uniformly without replacement, if they are to be rolled out."""
        count = self.config.num_references()
        if not count:
            return ()
        drawn = rng.choice(len(self._index), count, replace=False)
        return tuple(self._index.ids[position] for position in drawn)

    def observe(self, observation: Observation) -> None:
        """Count the successes and trials of references."""
        self._references.observe(self._index.rows(observation), observation)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Attend, calibrate, correct by the line, and blend in own counts."""
        references = self._references.at(policy_version)
        if not len(references):
            size = len(self._index)
            return SuccessEstimate(self._index.ids, np.full(size, 0.5), np.zeros(size))
        predicted = self._predictor.predict(references)
        mean, evidence = predicted.mean, np.full(len(self._index), predicted.evidence)
        own, prior = references.positions, self.config.prior_rollouts
        mean[own] = (prior * mean[own] + references.successes) / (prior + references.trials)
        evidence[own] += references.trials
        return SuccessEstimate(self._index.ids, mean, evidence, predicted.figures)

    def state_dict(self) -> State:
        """Give the measurements, and one embedding by which a changed embedder is noticed."""
        return {
            "references": self._references.state_dict(self._index),
            "first_embedding": self._predictor.first_embedding,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back.

        Raises:
            ValueError: the embeddings are not those of the checkpoint.
        """
        self._predictor.check_first_embedding(state["first_embedding"])
        self._references.load_state_dict(state["references"], self._index)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [AttentionEstimator]
