"""The estimator that knows nothing: for runs that choose questions without looking at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import numpy as np

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


class NoneConfig(EstimatorConfig):
    """Options of ``none``: there are none."""

    type: Literal["none"] = "none"


@final
class NoneEstimator(Estimator):
    """Say one half of every question, with no evidence; what plain GRPO with uniform batches needs."""

    config: NoneConfig
    estimates: ClassVar[bool] = False

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Remember which questions there are."""
        self._ids = tuple(question.id for question in questions)
        self._known = frozenset(self._ids)

    def observe(self, observation: Observation) -> None:
        """Check that the questions are known, and forget what was measured."""
        for name in observation.question_ids:
            if name not in self._known:
                raise ValueError(
                    f"none: observed question {name!r}, which is not among the {len(self._ids)} of start()"
                )

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Give 0.5 with evidence 0 for every question."""
        return SuccessEstimate(self._ids, np.full(len(self._ids), 0.5), np.zeros(len(self._ids)))


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [NoneEstimator]
