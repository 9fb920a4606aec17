"""A replay buffer that prefers groups whose successes varied and whose answers are fresh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import BatchArithmetic, Component, Context, Group, Replay, ReplayConfig, hookimpl
from dteframe.records import State
from dteframe.replay.fifo import capacity_problems


class PrioritisedConfig(ReplayConfig):
    """Options of ``prioritised``."""

    type: Literal["prioritised"] = "prioritised"
    capacity: int = Field(default=512, ge=1)
    """Groups that the buffer holds at most, one per question; beyond it those of least weight leave."""
    freshness_steps: float = Field(default=4.0, gt=0)
    """Policy versions after which a group's weight has fallen to 1/e."""
    max_staleness: int | None = Field(default=8, ge=1)
    """Policy versions between a group's answers and its replay, at most; null is no limit."""
    max_uses: int | None = Field(default=3, ge=1)
    """Times that a group is replayed, at most; its fresh use doesn't count; null is no limit."""

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse a capacity below one draw: replay could never start."""
        yield from capacity_problems(self.capacity, arithmetic)

    def num_held(self) -> int:
        """Say how many groups the buffer holds at most."""
        return self.capacity


@final
class PrioritisedReplay(Replay):
    """Draw without replacement, by weights ``rate x (1 - rate) x exp(-staleness / freshness_steps)``.

    Only groups with ``0 < successes < trials`` enter, one per question: a newer one takes the place of an
    older one. What is too stale or used up leaves.

    Source: FreshPER, arXiv:2604.16918, for priorities that fade with age; there of trajectories, by |reward|,
        raised to the power of 0.6, over 500 steps, and corrected by importance weights. Here groups are drawn
        by the variance of their successes, and the objective corrects for the policy alone.
    """

    config: PrioritisedConfig

    def __init__(self, config: PrioritisedConfig, context: Context) -> None:
        """Start empty."""
        super().__init__(config, context)
        self._groups: dict[str, Group] = {}  # by question, in the order of entering
        self._uses: dict[str, int] = {}

    def offer(self, groups: Sequence[Group]) -> None:
        """Take the informative groups, and let those of least weight go beyond the capacity."""
        for group in groups:
            kept = self._groups.get(group.question_id)
            is_outdated = kept is not None and kept.policy_version > group.policy_version
            if group.is_informative and not is_outdated:
                self._drop(group.question_id)
                self._groups[group.question_id] = group
                self._uses[group.question_id] = 0
        self._evict()

    def num_ready(self, policy_version: int) -> int:
        """Count the groups within the age limit at that version."""
        return sum(self._is_ready(group, policy_version) for group in self._groups.values())

    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Draw by weight, and drop what can never be drawn again."""
        stale = [name for name, group in self._groups.items() if not self._is_ready(group, policy_version)]
        for name in stale:
            self._drop(name)
        ready = [group for name, group in self._groups.items() if name not in excluded]
        log_weights = np.array([self._log_weight(group, policy_version) for group in ready])
        # The largest Gumbel keys are a draw by weight without replacement (arXiv:1903.06059, 2.3).
        order = np.argsort(-(log_weights + rng.gumbel(size=len(ready))), kind="stable")
        drawn = [ready[place] for place in order[:count]]
        for group in drawn:
            self._uses[group.question_id] += 1
            if self._uses[group.question_id] == self.config.max_uses:
                self._drop(group.question_id)
        return drawn

    def state_dict(self) -> State:
        """Give all groups in the order of entering, with their uses."""
        return {
            "groups": [group.to_state() for group in self._groups.values()],
            "uses": [self._uses[name] for name in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the groups back in the same order."""
        groups = [Group.from_state(item) for item in state["groups"]]
        self._groups = {group.question_id: group for group in groups}
        self._uses = dict(zip(self._groups, state["uses"], strict=True))
        self._evict()

    def _log_weight(self, group: Group, policy_version: int) -> float:
        variance = group.success_rate * (1 - group.success_rate)
        age = policy_version - group.policy_version
        return float(np.log(variance) - age / self.config.freshness_steps)

    def _is_ready(self, group: Group, policy_version: int) -> bool:
        limit = self.config.max_staleness
        return limit is None or policy_version - group.policy_version <= limit

    def _evict(self) -> None:
        num_beyond = len(self._groups) - self.config.capacity
        if num_beyond <= 0:
            return
        # Which version is the present one shifts all weights alike. Of equals the first to enter leaves.
        by_weight = sorted(self._groups, key=lambda name: self._log_weight(self._groups[name], 0))
        for name in by_weight[:num_beyond]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._groups.pop(name, None)
        self._uses.pop(name, None)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [PrioritisedReplay]
