"""The replay buffer that keeps nothing: every group is trained on once, fresh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import numpy as np

from dteframe import Component, Group, Replay, ReplayConfig, hookimpl


class NoneConfig(ReplayConfig):
    """Options of ``none``: there are none."""

    type: Literal["none"] = "none"


@final
class NoneReplay(Replay):
    """Keep nothing and give nothing back: all groups of a step are fresh."""

    config: NoneConfig
    replays: ClassVar[bool] = False

    def offer(self, groups: Sequence[Group]) -> None:
        """Let the groups go."""

    def num_ready(self, policy_version: int) -> int:
        """Count nothing: 0."""
        return 0

    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Give no group, however many are wanted."""
        return ()


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [NoneReplay]
