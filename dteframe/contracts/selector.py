"""Selectors: which questions next?"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import BatchArithmetic, Selection, SuccessEstimate


class SelectorConfig(PluginConfig):
    """Options that every selector has; the engine sees to them."""

    cooldown: int = Field(default=0, ge=0)
    """Steps for which a chosen question is not chosen again; 0 is off."""
    max_uses: int | None = Field(default=None, ge=1)
    """How often a question is chosen in a run at most; null is without end. Where too few questions are left,
    those that have rested longest are brought back, and counted."""
    coverage_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of a choice that is drawn uniformly, whatever the estimate says: so that an estimator that learns
    from training groups sees more than what it expected."""


class Selector(Component):
    """Which questions next?"""

    kind = "selector"
    config: SelectorConfig
    needs_estimate: ClassVar[bool] = True
    """False for a selector that ignores the estimate's numbers."""

    def start(self, arithmetic: BatchArithmetic) -> None:
        """Learn the run's sizes before the first selection."""

    @abstractmethod
    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose ``count`` distinct questions among the estimate's, in the order of asking.

        The estimate covers the questions that may be asked now: some of the pool may be missing.
        Raises ValueError if there are fewer than ``count``.
        """
