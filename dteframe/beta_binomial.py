"""Beta distributions of success rates, and what they say of a group of rollouts; numpy alone.

Only integer counts occur, so that ratios of Beta functions are products and no gamma function is needed.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

MIN_PARAMETER = 1e-9
"""Beta parameters are at least this, so that a mean of exactly 0 or 1 leaves logarithms finite."""


def parameters(
    mean: Float[np.ndarray, "questions"], evidence: Float[np.ndarray, "questions"]
) -> tuple[Float[np.ndarray, "questions"], Float[np.ndarray, "questions"]]:
    """Turn means and evidence in rollouts into Beta parameters.

    Below one rollout of evidence the uniform distribution fills in: no evidence at all is Beta(1, 1), not a
    rate that is surely 0 or 1.
    """
    uniform = np.maximum(1.0 - evidence, 0.0)
    first = mean * evidence + uniform
    second = (1.0 - mean) * evidence + uniform
    return np.maximum(first, MIN_PARAMETER), np.maximum(second, MIN_PARAMETER)


def mixed_probability(
    first: Float[np.ndarray, "questions"], second: Float[np.ndarray, "questions"], num_generations: int
) -> Float[np.ndarray, "questions"]:
    """Give the chance that ``num_generations`` rollouts hold both a success and a failure."""
    all_right, all_wrong = np.ones_like(first), np.ones_like(first)
    for done in range(num_generations):
        total = first + second + done
        all_right *= (first + done) / total
        all_wrong *= (second + done) / total
    return np.asarray(np.clip(1.0 - all_right - all_wrong, 0.0, 1.0))


def log_likelihood(
    first: Float[np.ndarray, "*groups"],
    second: Float[np.ndarray, "*groups"],
    successes: Int[np.ndarray, "*groups"],
    trials: Int[np.ndarray, "*groups"],
) -> Float[np.ndarray, "*groups"]:
    """Give the log-likelihood in nats of seeing these rollouts, in their order, under Beta(first, second).

    In their order means without the binomial coefficient, which no estimate can change. Arrays broadcast.
    """
    result = np.zeros(np.broadcast_shapes(first.shape, second.shape, successes.shape, trials.shape))
    failures = trials - successes
    for done in range(int(trials.max(initial=0))):
        result += np.where(done < successes, np.log(first + done), 0.0)
        result += np.where(done < failures, np.log(second + done), 0.0)
        result -= np.where(done < trials, np.log(first + second + done), 0.0)
    return result
