"""Which measured questions attention looks at: rolled out for it, or what training measured anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Num

from dteframe import Observation
from dteframe.estimators.observed import AgedRecord, PoolIndex, halving
from dteframe.records import State

Source: TypeAlias = Literal["rolled_out", "training"]
MIN_TRIALS = 0.5
"""Aged rollouts below which a measured question is no reference any more."""


@dataclass(frozen=True, slots=True)
class ReferenceSet:
    """Measured questions, in ascending order of position."""

    positions: Int[np.ndarray, "references"]
    """In the pool; distinct."""
    successes: Num[np.ndarray, "references"]
    trials: Num[np.ndarray, "references"]
    """Rollouts, above 0; aged ones are fractions."""

    def __len__(self) -> int:
        """Count the references."""
        return len(self.positions)

    @property
    def rates(self) -> Float[np.ndarray, "references"]:
        """Divide successes by trials."""
        return np.asarray(self.successes / self.trials)

    @property
    def are_alike(self) -> bool:
        """Whether all have as many trials, so that none counts more than another."""
        return len(self.trials) == 0 or float(np.ptp(self.trials)) == 0.0


class RolledOutReferences:
    """What was observed with purpose ``reference`` under the newest policy version that has such."""

    def __init__(self, num_questions: int) -> None:
        """Start without measurements."""
        self._version = -1
        self._counts = np.zeros((2, num_questions), np.int64)

    def observe(self, rows: tuple[np.ndarray, np.ndarray, np.ndarray], observation: Observation) -> None:
        """Add to that version's counts; a newer version starts anew, an older one is outdated and let go."""
        if observation.purpose != "reference":
            return
        if observation.policy_version > self._version:
            self._version = observation.policy_version
            self._counts[:] = 0
        if observation.policy_version == self._version:
            positions, successes, trials = rows
            self._counts[:, positions] += np.stack([successes, trials])

    def at(self, policy_version: int) -> ReferenceSet:
        """Give the counts, whatever the version."""
        positions = np.flatnonzero(self._counts[1])
        return ReferenceSet(positions, *self._counts[:, positions])

    def state_dict(self, index: PoolIndex) -> State:
        """Give the counts of the measured questions, by id."""
        positions = np.flatnonzero(self._counts[1])
        return {
            "policy_version": self._version,
            "question_ids": [index.ids[position] for position in positions],
            "successes": self._counts[0, positions],
            "trials": self._counts[1, positions],
        }

    def load_state_dict(self, state: Mapping[str, Any], index: PoolIndex) -> None:
        """Take the counts back."""
        positions = [index.positions[name] for name in state["question_ids"]]
        self._version = int(state["policy_version"])
        self._counts[:] = 0
        self._counts[0, positions] = state["successes"]
        self._counts[1, positions] = state["trials"]


class AgedReferences:
    """The measured questions that weigh most after all groups have aged."""

    def __init__(self, num_questions: int, size: int, half_life: float, *, only_rolled_out: bool) -> None:
        """Start without measurements; at most ``size`` questions are references at a time.

        ``only_rolled_out`` leaves out what training measured.
        """
        self._size, self._only_rolled_out = size, only_rolled_out
        self._record = AgedRecord(num_questions, [halving(half_life)])

    def observe(self, rows: tuple[np.ndarray, np.ndarray, np.ndarray], observation: Observation) -> None:
        """Add groups of the purposes that count."""
        if observation.purpose == "reference" or not self._only_rolled_out:
            self._record.add(*rows, observation.policy_version)

    def at(self, policy_version: int) -> ReferenceSet:
        """Age the record, and take the questions with most rollouts left, the earlier one where they tie."""
        successes, trials = self._record.at(policy_version, 0)
        kept = np.flatnonzero(trials >= MIN_TRIALS)
        if len(kept) > self._size:
            last = np.partition(trials[kept], -self._size)[-self._size]
            above, equal = kept[trials[kept] > last], kept[trials[kept] == last]
            kept = np.sort(np.concatenate([above, equal[: self._size - len(above)]]))
        return ReferenceSet(kept, successes[kept], trials[kept])

    def state_dict(self, index: PoolIndex) -> State:
        """Give the record, by id."""
        state = dict(self._record.state_dict())
        state["question_ids"] = [index.ids[position] for position in np.asarray(state.pop("positions"))]
        return state

    def load_state_dict(self, state: Mapping[str, Any], index: PoolIndex) -> None:
        """Take the record back."""
        positions = [index.positions[name] for name in state["question_ids"]]
        self._record.load_state_dict({**state, "positions": np.array(positions, np.int64)})
