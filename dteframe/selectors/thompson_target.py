"""Questions whose drawn success rate is nearest to a target: what is uncertain is tried now and then."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
from pydantic import Field

from dteframe import Component, Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl
from dteframe.beta_binomial import parameters


class ThompsonTargetConfig(SelectorConfig):
    """Options of ``thompson_target``."""

    type: Literal["thompson_target"] = "thompson_target"
    target_success_rate: float = Field(default=0.5, ge=0, le=1)
    """Success rate that is looked for."""


@final
class ThompsonTargetSelector(Selector):
    """Draw a success rate from every question's Beta distribution; choose those nearest to the target.

    Source: MoPPS, arXiv:2507.04632, 3.3, which draws for a random part of the pool; here for all of it.
    """

    config: ThompsonTargetConfig

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Draw, take the ``count`` nearest by a partition, and shuffle them so that batches are alike."""
        size = len(estimate.question_ids)
        if count > size:
            raise ValueError(f"thompson_target: asked for {count} of {size} questions; ask for fewer")
        estimate = estimate.in_order()
        drawn = rng.beta(*parameters(estimate.mean, estimate.evidence))
        distances = np.abs(drawn - self.config.target_success_rate)
        nearest = np.argpartition(distances, count - 1)[:count] if count else np.zeros(0, np.int64)
        chosen = rng.permutation(np.sort(nearest))
        return Selection(tuple(estimate.question_ids[index] for index in chosen))


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [ThompsonTargetSelector]
