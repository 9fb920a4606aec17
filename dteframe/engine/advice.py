"""Say when selection can hardly pay: most groups are informative anyway, or references cost too much."""

from __future__ import annotations

import math

from dteframe.engine.progress import Progress
from dteframe.engine.setup import Setup
from dteframe.records import LEAST_GAIN

MIN_GROUPS = 64
"""Uniformly drawn groups that have to be seen first."""
STANDARD_ERRORS = 1.96
"""Of the interval whose lower end has to be enough, so that it is not said by chance."""


def advise(setup: Setup, progress: Progress) -> None:
    """Warn once where not even a perfect choice would be worth its cost."""
    fraction = progress.forecasts.uniform_informative_fraction
    count = progress.forecasts.num_uniform
    if progress.has_advised or not setup.parts.selector.needs_estimate or count < MIN_GROUPS:
        return
    assert fraction is not None, "there are enough groups"
    reuses = setup.recipe.training.reuse_references
    low = lower_end(fraction, count)
    gain = setup.arithmetic.best_gain(low, reuses_references=reuses)
    if gain >= LEAST_GAIN:
        return
    progress.has_advised = True
    paid = ", references included," if setup.arithmetic.reference_size else ""
    setup.context.warn(
        f"selection can hardly pay: {fraction:.0%} of {count} uniformly drawn groups are informative (at "
        f"least {low:.0%}, but for chance), so that a perfect choice would have {gain:.2f} times as many per "
        f"rollout{paid} as a uniform one; take harder questions, or selector: {{type: uniform}}"
    )


def lower_end(fraction: float, count: int) -> float:
    """Give the lower end of a share's 95 % interval.

    Source: Wilson, Probable inference, JASA 1927: right for shares near 1 too.
    """
    squared = STANDARD_ERRORS**2 / count
    spread = math.sqrt(fraction * (1 - fraction) / count + squared / (4 * count))
    return (fraction + squared / 2 - STANDARD_ERRORS * spread) / (1 + squared)
