"""An estimator without references: each question's own success rate, remembered and slowly forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    Estimator,
    EstimatorConfig,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)


class RunningAverageConfig(EstimatorConfig):
    """Options of ``running_average``."""

    type: Literal["running_average"] = "running_average"
    prior_success_rate: float = Field(default=0.5, ge=0, le=1)
    """Success rate of a question that was never asked, in [0, 1]."""
    prior_rollouts: float = Field(default=2.0, gt=0)
    """Rollouts that the prior is worth: with more of them, measurements count less."""
    memory: float = Field(default=0.9, gt=0, le=1)
    """What a question's earlier rollouts still count for when it is measured again; 1 forgets nothing."""


@final
class RunningAverage(Estimator):
    """Running average of each question's own success rate, with a prior."""

    config: RunningAverageConfig

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Begin with no rollouts of any question."""
        self._row = {question.id: row for row, question in enumerate(questions)}
        self._successes = np.zeros(len(questions))
        self._trials = np.zeros(len(questions))

    def observe(self, observation: Observation) -> None:
        """Add the counts to what is left of the earlier ones."""
        unknown = [name for name in observation.question_ids if name not in self._row]
        if unknown:
            raise ValueError(f"question {unknown[0]!r} is not in the pool")
        rows = [self._row[name] for name in observation.question_ids]
        self._successes[rows] = self.config.memory * self._successes[rows] + observation.successes
        self._trials[rows] = self.config.memory * self._trials[rows] + observation.trials

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Blend prior and counts: the mean of a Beta distribution, and the rollouts that it is worth."""
        evidence = self.config.prior_rollouts + self._trials
        mean = (self.config.prior_rollouts * self.config.prior_success_rate + self._successes) / evidence
        num_asked = float(np.count_nonzero(self._trials))
        return SuccessEstimate(tuple(self._row), mean, evidence, {"num_questions_asked": num_asked})

    def state_dict(self) -> Mapping[str, Any]:
        """Give the counts by question, so that a resumed run may hold the questions in another order."""
        return {"ids": list(self._row), "successes": self._successes, "trials": self._trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the counts back."""
        rows = [self._row[name] for name in state["ids"]]
        self._successes[rows], self._trials[rows] = state["successes"], state["trials"]


@hookimpl
def dteframe_components() -> list[type[Estimator]]:
    """Add ``estimator.type=running_average``."""
    return [RunningAverage]
