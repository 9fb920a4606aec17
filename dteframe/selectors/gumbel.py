"""Drawing without replacement by weights that are given as logarithms."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


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
