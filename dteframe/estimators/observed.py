"""What estimators keep of observations: who was measured, and records that fade with age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dteframe import Observation, Question
from dteframe.records import State


class PoolIndex:
    """Where each question stands in the pool."""

    def __init__(self, questions: Sequence[Question], estimator: str) -> None:
        """Number the questions; ``estimator`` is who complains of unknown ones."""
        self.ids = tuple(question.id for question in questions)
        self.positions = {name: position for position, name in enumerate(self.ids)}
        self._estimator = estimator

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.ids)

    def rows(
        self, observation: Observation
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Give distinct positions in ascending order, successes and trials.

        Raises:
            ValueError: a question is unknown or its counts are impossible; names it.
        """
        columns = (observation.question_ids, observation.successes.tolist(), observation.trials.tolist())
        for name, successes, trials in zip(*columns, strict=True):
            if name not in self.positions:
                raise ValueError(
                    f"{self._estimator}: observed question {name!r}, which is not among the "
                    f"{len(self.ids)} of the pool"
                )
            if not 0 <= successes <= trials or trials < 1:
                raise ValueError(
                    f"{self._estimator}: question {name!r} has {successes} successes in {trials} trials"
                )
        every = np.array([self.positions[name] for name in observation.question_ids], np.int64)
        positions, places = np.unique(every, return_inverse=True)
        sums = np.zeros((2, len(positions)), np.int64)
        np.add.at(sums[0], places, observation.successes)
        np.add.at(sums[1], places, observation.trials)
        return positions, sums[0], sums[1]


class AgedRecord:
    """Successes and trials per question that halve with every half-life of policy versions.

    Several half-lives are kept at once, so that the better one can be found. A question's sums are those of
    its last measurement and fade when they are read: the cost of a measurement does not depend on the pool.
    """

    def __init__(self, num_questions: int, half_lives: Sequence[float]) -> None:
        """Start without measurements; half-lives are in policy versions, ``inf`` never fades."""
        self.half_lives = np.array(half_lives, np.float64)
        self._successes = np.zeros((len(half_lives), num_questions))
        self._trials = np.zeros((len(half_lives), num_questions))
        self._version = np.full(num_questions, -1, np.int64)

    def add(
        self,
        positions: Int[np.ndarray, "n"],
        successes: Int[np.ndarray, "n"],
        trials: Int[np.ndarray, "n"],
        policy_version: int,
    ) -> None:
        """Add measurements of distinct questions; those of an older version are aged on arrival."""
        newest = np.maximum(self._version[positions], policy_version)
        before, own = self._fading(newest - self._version[positions]), self._fading(newest - policy_version)
        self._successes[:, positions] = before * self._successes[:, positions] + own * successes
        self._trials[:, positions] = before * self._trials[:, positions] + own * trials
        self._version[positions] = newest

    def at(
        self, policy_version: int, half_life: int, positions: Int[np.ndarray, "n"] | slice = slice(None)
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Give aged successes and trials, under the half-life of that number."""
        age = np.maximum(policy_version - self._version[positions], 0)
        fading = self._fading(age)[half_life]
        return (
            fading * self._successes[half_life, positions],
            fading * self._trials[half_life, positions],
        )

    @property
    def is_measured(self) -> np.ndarray:
        """Say of each question whether it was ever measured (bool)."""
        return np.asarray(self._version >= 0)

    def state_dict(self) -> State:
        """Give the measured questions alone."""
        positions = np.flatnonzero(self._version >= 0)
        return {
            "positions": positions,
            "versions": self._version[positions],
            "successes": self._successes[:, positions],
            "trials": self._trials[:, positions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back."""
        positions = np.asarray(state["positions"], np.int64)
        self._version[positions] = state["versions"]
        self._successes[:, positions] = state["successes"]
        self._trials[:, positions] = state["trials"]

    def _fading(self, age: Int[np.ndarray, "n"]) -> Float[np.ndarray, "half_lives n"]:
        return np.asarray(np.exp2(-age / self.half_lives[:, None]))
