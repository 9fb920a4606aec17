"""A replay buffer that gives the newest informative groups back, once each."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe import Context, Group, Replay, ReplayConfig, hookimpl


class MyPluginConfig(ReplayConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    capacity: int = Field(default=256, ge=1)
    """Groups kept at most; the oldest leave first."""


@final
class MyPlugin(Replay):
    """The newest informative groups, each replayed once."""

    config: MyPluginConfig

    def __init__(self, config: MyPluginConfig, context: Context) -> None:
        """Begin with an empty buffer."""
        super().__init__(config, context)
        self._groups: dict[str, Group] = {}

    def offer(self, groups: Sequence[Group]) -> None:
        """Keep the informative ones; a newer group takes the place of its question's older one."""
        for group in groups:
            if group.is_informative:
                self._groups.pop(group.question_id, None)
                self._groups[group.question_id] = group
        for oldest in list(self._groups)[: -self.config.capacity]:
            del self._groups[oldest]

    def num_ready(self, policy_version: int) -> int:
        """Count what is kept."""
        return len(self._groups)

    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Take the newest groups out of the buffer."""
        ready = [name for name in reversed(self._groups) if name not in excluded]
        return [self._groups.pop(name) for name in ready[:count]]

    def state_dict(self) -> Mapping[str, Any]:
        """Give the groups, oldest first."""
        return {"groups": [group.to_state() for group in self._groups.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        groups = [Group.from_state(item) for item in state["groups"]]
        self._groups = {group.question_id: group for group in groups}


@hookimpl
def dteframe_components() -> list[type[Replay]]:
    """Add ``replay.type=my_plugin``."""
    return [MyPlugin]
