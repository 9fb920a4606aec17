"""Questions whose group will most likely hold both successes and failures."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
from pydantic import Field

from dteframe import (
    BatchArithmetic,
    Component,
    Selection,
    Selector,
    SelectorConfig,
    SuccessEstimate,
    hookimpl,
)
from dteframe.beta_binomial import mixed_probability, parameters
from dteframe.selectors.gumbel import gumbel_top_k


class InformativeProbabilityConfig(SelectorConfig):
    """Options of ``informative_probability``."""

    type: Literal["informative_probability"] = "informative_probability"
    temperature: float = Field(default=0.02, gt=0)
    """Sharpness of the choice, in units of the chance: small is the likeliest alone, large is uniform."""


@final
class InformativeProbabilitySelector(Selector):
    """Choose questions by the chance that their group is informative, the likelier the oftener.

    The chance of a mixed group of G rollouts under the estimate's Beta(a, b) is 1 - [B(a + G, b) + B(a, b +
    G)] / B(a, b): a question that is surely near 1/2 comes before one of which nothing is known, and that
    before one that is surely near 0 or 1. P(question) is proportional to exp(chance / temperature).

    Source: the probability of an informative group is that of the greedy allocator in Knapsack RL,
        arXiv:2509.25849, with the posterior in place of a point; the soft choice is ours.
    """

    config: InformativeProbabilityConfig

    def start(self, arithmetic: BatchArithmetic) -> None:
        """Learn how many rollouts a group has."""
        self._num_generations = arithmetic.num_generations

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Draw ``count`` questions without replacement, and shuffle them so that batches are alike."""
        estimate = estimate.in_order()
        first, second = parameters(estimate.mean, estimate.evidence)
        chances = mixed_probability(first, second, self._num_generations)
        chosen = rng.permutation(gumbel_top_k(chances / self.config.temperature, count, rng))
        return Selection(tuple(estimate.question_ids[index] for index in chosen))


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [InformativeProbabilitySelector]
