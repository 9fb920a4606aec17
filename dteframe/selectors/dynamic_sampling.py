"""Ask more questions than a step trains on, and train on those whose rewards differ: DAPO's way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Group,
    Review,
    Selection,
    Selector,
    SelectorConfig,
    SuccessEstimate,
    hookimpl,
)
from dteframe.records import State
from dteframe.selectors.uniform import UniformConfig, UniformSelector


class DynamicSamplingConfig(SelectorConfig):
    """Options of ``dynamic_sampling``."""

    type: Literal["dynamic_sampling"] = "dynamic_sampling"
    oversampling: float = Field(default=3.0, ge=1)
    """Questions asked for each group that is still wanted, in every round (1,536 for 512 in the paper). The
    cheapest is about 1 over the share of groups whose rewards differ: what is accepted beyond a step's room
    is paid for and not trained on."""
    max_rounds: int = Field(default=10, ge=1)
    """Rounds of asking in a step, at most; then it trains on fewer groups."""

    def questions_per_group(self) -> float:
        """Ask ``oversampling`` questions for each group."""
        return self.oversampling

    def rounds_per_step(self) -> int:
        """Go on for ``max_rounds``."""
        return self.max_rounds


@final
class DynamicSamplingSelector(Selector):
    """Ask questions uniformly, reject groups of equal rewards, and ask again until a step is full.

    Source: DAPO, arXiv:2503.14476, 3.2 and Alg. 1; verl's recipe, where ``gen_batch_size`` over
        ``train_batch_size`` is our ``oversampling``, and ``max_num_gen_batches`` our ``max_rounds``.
        As there, groups beyond the room of a step are not kept for the next one; replay is offered them here.
        Another round asks for what is still missing, times ``oversampling``, where verl generates a whole
        batch again; and where verl stops a run whose rounds are used up, the step trains on fewer groups.
    """

    config: DynamicSamplingConfig
    needs_estimate: ClassVar[bool] = False
    reviews: ClassVar[bool] = True

    def __init__(self, config: DynamicSamplingConfig, context: Context) -> None:
        """Start the first epoch."""
        super().__init__(config, context)
        self._base = UniformSelector(UniformConfig(), context)

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose uniformly among the questions not yet asked in this epoch."""
        return self._base.select(estimate, count, rng)

    def review(self, groups: Sequence[Group], num_missing: int) -> Review:
        """Accept groups whose rewards differ; ask ``oversampling`` questions for each that is missing."""
        accepted = tuple(group.question_id for group in groups if not group.has_equal_rewards)
        still_missing = max(num_missing - len(accepted), 0)
        return Review(accepted, math.ceil(still_missing * self.config.oversampling - 1e-9))

    def state_dict(self) -> State:
        """Give the questions asked in this epoch."""
        return self._base.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the checkpoint's epoch."""
        self._base.load_state_dict(state)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [DynamicSamplingSelector]
