"""The selector of the DOTS paper: questions near a target success rate, by Gumbel top-k."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
from pydantic import Field

from dteframe import Component, Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl
from dteframe.selectors.gumbel import gumbel_top_k


class DifficultyTargetConfig(SelectorConfig):
    """Options of ``difficulty_target``."""

    type: Literal["difficulty_target"] = "difficulty_target"
    target_success_rate: float = Field(default=0.5, ge=0, le=1)
    """Success rate that is looked for (alpha of the paper, which states it on the failure rate): 0.25 prefers
    questions solved a quarter of the time."""
    temperature: float = Field(default=1e-3, gt=0)
    """Sharpness of the choice (tau of the paper), in units of the success rate: small is the nearest
    questions only, large is uniform. 1e-3 for the attention estimator; about 0.1 for estimators of each
    question's own history."""


@final
class DifficultyTargetSelector(Selector):
    """Choose questions near a target success rate, the nearer the likelier.

    P(question) is proportional to exp(-|rate - target| / temperature).

    Source: DOTS, arXiv:2506.05316, Alg. 1 line 10. The released code draws by softmax and multinomial in
    float32,
        which gives questions of probability 0 once the near ones are used up; Gumbel keys in log space are
        the same distribution without that failure. The target is a success rate, as in the released code.
    """

    config: DifficultyTargetConfig

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Draw ``count`` questions without replacement, and shuffle them so that batches are alike."""
        estimate = estimate.in_order()
        rates = np.asarray(estimate.mean, np.float64)
        if not np.isfinite(rates).all():
            name = estimate.question_ids[int(np.argmin(np.isfinite(rates)))]
            raise ValueError(f"difficulty_target: the estimate of question {name!r} is not a finite number")
        log_weights = -np.abs(rates - self.config.target_success_rate) / self.config.temperature
        chosen = rng.permutation(gumbel_top_k(log_weights, count, rng))
        return Selection(tuple(estimate.question_ids[index] for index in chosen))


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [DifficultyTargetSelector]
