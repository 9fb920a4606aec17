"""What estimators keep of observations: who was measured, and records that fade with age."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

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
                    f"{self._estimator}: question {name!r} has {successes} successes in {trials} trials; "
                    "needs 0 <= successes <= trials and 1 trial at least"
                )
        every = np.array([self.positions[name] for name in observation.question_ids], np.int64)
        positions, places = np.unique(every, return_inverse=True)
        sums = np.zeros((2, len(positions)), np.int64)
        np.add.at(sums[0], places, observation.successes)
        np.add.at(sums[1], places, observation.trials)
        return positions, sums[0], sums[1]


Ageing: TypeAlias = "Callable[[Float[np.ndarray, 'n'], Int[np.ndarray, 'n']], Float[np.ndarray, 'n']]"
"""Of records of some rollouts, after some policy versions: the share of each that still counts."""


def halving(half_life: float) -> Ageing:
    """Let records halve with every ``half_life`` policy versions, however long they are."""
    return lambda trials, age: np.asarray(np.exp2(-age / half_life))


def drifting(persistence: float) -> Ageing:
    """Let records wear off as they do of a rate that takes a random step with every policy version.

    Steps of variance m (1 - m) / persistence add age / persistence to 1 / n, the variance of a record of n
    rollouts over m (1 - m): n / (1 + n age / persistence) are left, at most persistence / age. Long records
    wear off fast, short ones slowly: a question that is measured over and over forgets as if by a half-life,
    and one that nobody asked since keeps what is known of it.
    """
    return lambda trials, age: np.asarray(1 / (1 + trials * age / persistence))


class AgedRecord:
    """Successes and trials per question that count for less the older they are, in one or several ways.

    Several ways are kept at once, so that the better one can be found. A question's sums are those of its
    last measurement and age when they are read: the cost of a measurement does not depend on the pool.
    """

    def __init__(self, num_questions: int, ageings: Sequence[Ageing]) -> None:
        """Start without measurements."""
        self._ageings = tuple(ageings)
        self._successes = np.zeros((len(ageings), num_questions))
        self._trials = np.zeros((len(ageings), num_questions))
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
        age, own_age = newest - self._version[positions], newest - policy_version
        for place, ageing in enumerate(self._ageings):
            before, own = ageing(self._trials[place, positions], age), ageing(trials, own_age)
            self._successes[place, positions] = before * self._successes[place, positions] + own * successes
            self._trials[place, positions] = before * self._trials[place, positions] + own * trials
        self._version[positions] = newest

    def at(
        self, policy_version: int, way: int, positions: Int[np.ndarray, "n"] | slice = slice(None)
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Give aged successes and trials, in the way of that number."""
        trials = self._trials[way, positions]
        age = np.maximum(policy_version - self._version[positions], 0)
        kept = self._ageings[way](trials, age)
        return kept * self._successes[way, positions], kept * trials

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
