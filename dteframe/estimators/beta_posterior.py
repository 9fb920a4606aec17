"""Each question's own record as a Beta distribution that forgets; no embeddings, no references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Estimator,
    EstimatorConfig,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)
from dteframe.estimators.observed import PoolIndex
from dteframe.records import State


class BetaPosteriorConfig(EstimatorConfig):
    """Options of ``beta_posterior``."""

    type: Literal["beta_posterior"] = "beta_posterior"
    discount: float = Field(default=0.5, ge=0, le=1)
    """What is kept of a question's record each time that it is measured anew (lambda of MoPPS, there 1 or
    0.5): 1 forgets nothing, 0 all but the newest group."""
    prior_successes: float = Field(default=1.0, gt=0)
    """Successes that every question is taken to have had before the first rollout (a0)."""
    prior_failures: float = Field(default=1.0, gt=0)
    """Failures likewise (b0)."""


@final
class BetaPosteriorEstimator(Estimator):
    """Predict every question from its own record alone; unmeasured ones have the prior.

    a <- discount a + (1 - discount) a0 + successes, likewise b with failures, for measured questions only.
    The estimate is Beta(a, b): the mean a / (a + b), worth a + b rollouts.

    Source: MoPPS, arXiv:2507.04632, 3.2. There Thompson draws choose the questions: ``thompson_target`` does.
    """

    config: BetaPosteriorConfig

    def __init__(self, config: BetaPosteriorConfig, context: Context) -> None:
        """Start without a pool."""
        super().__init__(config, context)
        self._prior = np.array([config.prior_successes, config.prior_failures])

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Give every question the prior."""
        self._index = PoolIndex(questions, "beta_posterior")
        self._counts = np.repeat(self._prior[:, None], len(questions), axis=1)

    def observe(self, observation: Observation) -> None:
        """Fade the records of the measured questions towards the prior, and add what was seen."""
        positions, successes, trials = self._index.rows(observation)
        kept = self.config.discount
        before = kept * self._counts[:, positions] + (1 - kept) * self._prior[:, None]
        self._counts[:, positions] = before + np.stack([successes, trials - successes])

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Give the Beta distributions as they stand, whatever the version."""
        evidence = self._counts.sum(axis=0)
        return SuccessEstimate(self._index.ids, self._counts[0] / evidence, evidence)

    def state_dict(self) -> State:
        """Give the records."""
        return {"counts": self._counts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the records back."""
        self._counts = np.array(state["counts"], np.float64)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [BetaPosteriorEstimator]
