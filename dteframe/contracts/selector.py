"""Selectors: which questions next?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import BatchArithmetic, Group, Observation, Review, Selection, SuccessEstimate


class SelectorConfig(PluginConfig):
    """Options that every selector has; the engine sees to them."""

    cooldown: int = Field(default=0, ge=0)
    """Steps for which a chosen question is not chosen again; 0 is off."""
    max_uses: int | None = Field(default=None, ge=1)
    """How often a question is chosen in a run at most; null is without end. Where too few questions are left,
    those that have rested longest are brought back, and counted."""
    coverage_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of a choice that is drawn uniformly, whatever the estimate says: so that an estimator that learns
    from training groups sees more than what it expected. What is left of a question after a whole number of
    them is one more by chance."""
    least_gain: float = Field(default=1.0, ge=1)
    """Choose only where the estimate expects at least this many times as many informative groups of the
    choice as of a uniform one; else draw all questions uniformly. 1 is off; below 1.25 selection hardly pays.
    For selectors that read the estimate."""

    def questions_per_group(self) -> float:
        """Say how many questions to ask at first for each group that a step wants; at least 1."""
        return 1.0

    def rounds_per_step(self) -> int:
        """Bound the rounds of asking in a step, the first one included; at least 1."""
        return 1


class Selector(Component):
    """Which questions next?"""

    kind = "selector"
    config: SelectorConfig
    needs_estimate: ClassVar[bool] = True
    """False for a selector that ignores the estimate's numbers."""
    reviews: ClassVar[bool] = False
    """True for a selector whose ``review`` may reject groups; else it is never asked."""

    def start(self, arithmetic: BatchArithmetic) -> None:
        """Learn the run's sizes before the first selection."""

    @abstractmethod
    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose ``count`` distinct questions among the estimate's, in the order of asking.

        The estimate covers the questions that may be asked now: some of the pool may be missing.
        Raises ValueError if there are fewer than ``count``.
        """

    def observe(self, observation: Observation) -> None:
        """Take note of a step's measured training groups, rejected ones included; once a step.

        The order of questions inside an observation must not matter.
        """

    def review(self, groups: Sequence[Group], num_missing: int) -> Review:
        """Say which groups of a round may be trained on, and how many questions to ask in another round.

        Groups that are accepted beyond ``num_missing`` are surplus: the first ones asked are trained on. The
        engine asks for another round only while groups are missing and rounds are left; then the step trains
        on fewer groups, and says so.

        Args:
            groups: of this round, scored, in the order of asking; not empty.
            num_missing: groups that the step still wants, this round not counted; at least 1.
        """
        return Review(tuple(group.question_id for group in groups))
