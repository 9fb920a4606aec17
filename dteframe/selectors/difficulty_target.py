"""The selector of the DOTS paper: questions near a target success rate, by Gumbel top-k."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from dteframe import Component, Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl


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
        by_id = sorted(range(len(estimate.question_ids)), key=estimate.question_ids.__getitem__)
        rates = np.asarray(estimate.mean, np.float64)[by_id]
        if not np.isfinite(rates).all():
            name = estimate.question_ids[by_id[int(np.argmin(np.isfinite(rates)))]]
            raise ValueError(f"difficulty_target: the estimate of question {name!r} is not a finite number")
        log_weights = -np.abs(rates - self.config.target_success_rate) / self.config.temperature
        chosen = rng.permutation(gumbel_top_k(log_weights, count, rng))
        return Selection(tuple(estimate.question_ids[by_id[index]] for index in chosen))


def gumbel_top_k(
    log_weights: Float[np.ndarray, "items"], count: int, rng: np.random.Generator
) -> Int[np.ndarray, "count"]:
    """Draw ``count`` items one after another without replacement, by weights given as logarithms.

    Args:
        log_weights: natural logarithms of the weights, up to a constant; finite, however far below 0.
        count: at most the number of items.
        rng: one uniform number per item is drawn.

    Returns:
        Indices in the order of drawing; the earlier item first where two keys are equal.

    Raises:
        ValueError: there are fewer items than ``count``.

    Source: Kool et al., Stochastic beams and where to find them, arXiv:1903.06059, 2.3.
    """
    if count > len(log_weights):
        raise ValueError(f"gumbel top-k: asked for {count} of {len(log_weights)} questions; ask for fewer")
    if count == 0:
        return np.zeros(0, np.int64)
    keys = np.asarray(log_weights, np.float64) + rng.gumbel(size=len(log_weights))
    last = np.partition(keys, -count)[-count]
    candidates = np.flatnonzero(keys >= last)  # more than count only if keys are equal
    order = np.argsort(-keys[candidates], kind="stable")
    return candidates[order][:count]


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [DifficultyTargetSelector]
