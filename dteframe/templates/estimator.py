"""An estimator that believes the last measurement of each question, and the average where there is none."""

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


class MyPluginConfig(EstimatorConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    prior_success_rate: float = Field(default=0.5, ge=0, le=1)
    """Success rate of every question before the first measurement, in [0, 1]."""


@final
class MyPlugin(Estimator):
    """The last measured success rate of each question."""

    config: MyPluginConfig

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """See the pool: nothing is measured yet."""
        self._row = {question.id: row for row, question in enumerate(questions)}
        self._rate = np.zeros(len(questions))
        self._trials = np.zeros(len(questions))

    def observe(self, observation: Observation) -> None:
        """Keep the new rates."""
        unknown = [name for name in observation.question_ids if name not in self._row]
        if unknown:
            raise ValueError(f"question {unknown[0]!r} is not in the pool")
        rows = [self._row[name] for name in observation.question_ids]
        self._rate[rows] = observation.successes / observation.trials
        self._trials[rows] = observation.trials

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Give the measured rates, and their average to the questions that were never asked."""
        asked = self._trials > 0
        average = float(self._rate[asked].mean()) if asked.any() else self.config.prior_success_rate
        return SuccessEstimate(tuple(self._row), np.where(asked, self._rate, average), self._trials.copy())

    def state_dict(self) -> Mapping[str, Any]:
        """Give everything that a resumed run must know."""
        return {"ids": list(self._row), "rate": self._rate, "trials": self._trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        rows = [self._row[name] for name in state["ids"]]
        self._rate[rows], self._trials[rows] = state["rate"], state["trials"]


@hookimpl
def dteframe_components() -> list[type[Estimator]]:
    """Add ``estimator.type=my_plugin``."""
    return [MyPlugin]
