"""Replay buffers: which earlier groups join the batch?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import Group


class ReplayConfig(PluginConfig):
    """Options that every replay buffer has; the engine sees to them."""

    ramp_up_steps: int = Field(default=0, ge=0)
    """Steps over which the replayed share of a step grows to what ``training.fresh_fraction`` leaves; 0: at
    once."""
    min_effective_sample_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Guard: where a step's replayed tokens are worth fewer samples than this share of their number, by their
    importance weights, the replayed share is halved; 0 is off."""
    max_kl_nats: float | None = Field(default=0.1, gt=0)
    """Guard: the same where the policy is further than this from those that sampled replayed tokens (nats a
    token); null is off."""

    def num_held(self) -> int:
        """Say how many groups the buffer holds at most: a checkpoint holds them too."""
        return 0


class Replay(Component):
    """Which earlier groups join the batch?"""

    kind = "replay"
    config: ReplayConfig
    replays: ClassVar[bool] = True
    """False for a buffer that never gives a group back, so that a recipe which counts on replay can be
    refused."""

    @abstractmethod
    def offer(self, groups: Sequence[Group]) -> None:
        """Take fresh groups; the buffer decides which to keep."""

    @abstractmethod
    def num_ready(self, policy_version: int) -> int:
        """Count the groups that ``draw`` could give at that version if no question were excluded."""

    @abstractmethod
    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Draw at most ``count`` groups of distinct questions, bit-equal to what was offered.

        Args:
            count: 0 or more; fewer are given when fewer qualify.
            policy_version: the present one; a group's staleness is the difference to its own.
            excluded: questions that are trained fresh in the same step; never drawn.
            rng: the only source of chance.
        """
