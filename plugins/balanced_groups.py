"""A selector that trains on groups of moderate success alone, and asks again for those that it rejects."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self, final

import numpy as np
from pydantic import Field, model_validator

from dteframe import Group, Review, Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl


class BalancedGroupsConfig(SelectorConfig):
    """Options of ``balanced_groups``."""

    type: Literal["balanced_groups"] = "balanced_groups"
    lowest_success_rate: float = Field(default=0.2, ge=0, le=1)
    """Groups with a lower success rate are rejected."""
    highest_success_rate: float = Field(default=0.8, ge=0, le=1)
    """Groups with a higher success rate are rejected."""
    max_rounds: int = Field(default=3, ge=2)
    """Rounds of asking in a step, at most."""

    @model_validator(mode="after")
    def _interval_is_not_empty(self) -> Self:
        if self.lowest_success_rate > self.highest_success_rate:
            raise ValueError(
                f"lowest_success_rate is {self.lowest_success_rate} and highest_success_rate "
                f"{self.highest_success_rate}; no group lies between"
            )
        return self

    def rounds_per_step(self) -> int:
        """Go on for ``max_rounds``."""
        return self.max_rounds


@final
class BalancedGroups(Selector):
    """Questions at random; groups outside an interval of success rates are rejected and asked for again.

    Source: online difficulty filtering, arXiv:2504.03380; its bounds are not known to us, these are ours.
    """

    config: BalancedGroupsConfig
    needs_estimate: ClassVar[bool] = False
    reviews: ClassVar[bool] = True

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose ``count`` questions, each as likely as another."""
        names = estimate.in_order().question_ids
        if count > len(names):
            raise ValueError(f"{count} questions are wanted and {len(names)} are left")
        return Selection(tuple(names[place] for place in rng.choice(len(names), count, replace=False)))

    def review(self, groups: Sequence[Group], num_missing: int) -> Review:
        """Accept groups within the interval, and ask as many questions as are missing then."""
        lowest, highest = self.config.lowest_success_rate, self.config.highest_success_rate
        accepted = [group.question_id for group in groups if lowest <= group.success_rate <= highest]
        return Review(tuple(accepted), num_more=max(num_missing - len(accepted), 0))


@hookimpl
def dteframe_components() -> list[type[Selector]]:
    """Add ``selector.type=balanced_groups``."""
    return [BalancedGroups]
