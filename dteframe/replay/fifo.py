"""The replay buffer of the DOTS paper: informative groups, first in first out, drawn uniformly.

Whether a step replays at all is not decided here: the engine asks ``num_ready`` once per plan and replays
only if the buffer holds at least a step's share, else it fills the step with fresh groups (the minimum-size
rule).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import BatchArithmetic, Component, Context, Group, Replay, ReplayConfig, hookimpl
from dteframe.records import State


class FifoConfig(ReplayConfig):
    """Options of ``fifo``."""

    type: Literal["fifo"] = "fifo"
    capacity: int = Field(default=512, ge=1)
    """Groups that the buffer holds at most (C of the paper, which used 256 or 512), one per question."""
    max_staleness: int | None = Field(default=None, ge=1)
    """Policy versions between a group's answers and its replay, at most; null is no limit, as in the
    paper."""
    max_uses: int | None = Field(default=None, ge=1)
    """Times that a group is replayed, at most; its fresh use doesn't count; null is no limit, as in the
    paper."""

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse a capacity below one draw: replay could never start."""
        yield from capacity_problems(self.capacity, arithmetic)

    def num_held(self) -> int:
        """Say how many groups the buffer holds at most."""
        return self.capacity


@final
class FifoReplay(Replay):
    """Keep the newest informative groups, evict the oldest, draw uniformly without replacement.

    Only groups with ``0 < successes < trials`` enter, one per question: a newer informative group takes the
    place of an older one and joins the end of the queue; a group from an older policy than the one kept is
    let go, and an uninformative one leaves the kept one alone. Drawn groups stay until they are evicted, used
    up or too stale.

    Source: DOTS, arXiv:2506.05316, 4.3 and Alg. 1 lines 16-19. We draw before the step's own groups are
    offered,
        hold one group per question, and count capacity in informative groups only, where the released code
        adds the newest raw batch on top. The age and use limits are ours.
    """

    config: FifoConfig

    def __init__(self, config: FifoConfig, context: Context) -> None:
        """Start empty."""
        super().__init__(config, context)
        self._groups: dict[str, Group] = {}  # by question, oldest first
        self._uses: dict[str, int] = {}

    def offer(self, groups: Sequence[Group]) -> None:
        """Take the informative groups, in the order given, and evict the oldest beyond the capacity."""
        for group in groups:
            kept = self._groups.get(group.question_id)
            is_outdated = kept is not None and kept.policy_version > group.policy_version
            if group.is_informative and not is_outdated:
                self._drop(group.question_id)
                self._groups[group.question_id] = group
                self._uses[group.question_id] = 0
        self._evict()

    def num_ready(self, policy_version: int) -> int:
        """Count the groups within the age and use limits at that version."""
        return sum(self._is_ready(group, policy_version) for group in self._groups.values())

    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Draw uniformly without replacement, and drop what can never be drawn again."""
        for name in [
            name for name, group in self._groups.items() if not self._is_ready(group, policy_version)
        ]:
            self._drop(name)
        ready = [group for name, group in self._groups.items() if name not in excluded]
        chosen = rng.permutation(len(ready))[:count]
        drawn = [ready[index] for index in chosen]
        for group in drawn:
            self._uses[group.question_id] += 1
            if self._uses[group.question_id] == self.config.max_uses:
                self._drop(group.question_id)
        return drawn

    def state_dict(self) -> State:
        """Give all groups, oldest first, with their uses."""
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

    def _is_ready(self, group: Group, policy_version: int) -> bool:
        limit = self.config.max_staleness
        return limit is None or policy_version - group.policy_version <= limit

    def _evict(self) -> None:
        while len(self._groups) > self.config.capacity:
            self._drop(next(iter(self._groups)))

    def _drop(self, name: str) -> None:
        self._groups.pop(name, None)
        self._uses.pop(name, None)


def capacity_problems(capacity: int, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
    """Say if a buffer of a capacity could never fill a step's share."""
    if capacity < arithmetic.num_replayed:
        yield (
            "capacity",
            f"{capacity} groups are fewer than the {arithmetic.num_replayed} that a step replays "
            f"(training.questions_per_step {arithmetic.questions_per_step} less {arithmetic.num_fresh} "
            "fresh), so replay can never start; raise replay.capacity or training.fresh_fraction",
        )


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [FifoReplay]
