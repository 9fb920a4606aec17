"""A selector that asks the questions whose expected success rate is nearest to a target."""

from typing import Literal, final

import numpy as np
from pydantic import Field

from dteframe import Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl


class MyPluginConfig(SelectorConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    target_success_rate: float = Field(default=0.5, ge=0, le=1)
    """Questions are asked in the order of their distance to it, in [0, 1]."""


@final
class MyPlugin(Selector):
    """The questions nearest to a target success rate, ties by chance."""

    config: MyPluginConfig

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Sort by distance; a random order first, so that ties are broken by chance."""
        available = len(estimate.question_ids)
        if count > available:
            raise ValueError(f"{count} questions are wanted and {available} are left")
        order = rng.permutation(available)
        distance = np.abs(estimate.mean[order] - self.config.target_success_rate)
        nearest = order[np.argsort(distance, kind="stable")[:count]]
        return Selection(tuple(estimate.question_ids[index] for index in nearest))


@hookimpl
def dteframe_components() -> list[type[Selector]]:
    """Add ``selector.type=my_plugin``."""
    return [MyPlugin]
