"""Divide a number of questions over the parts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence


def divided(size: int, weights: Sequence[float]) -> list[int]:
    """Divide ``size`` by weight; what is left over goes to the largest remainders, the earlier first.

    >>> divided(10, [1, 1, 1])
    [4, 3, 3]
    """
    shares = [size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return counts
