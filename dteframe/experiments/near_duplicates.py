"""Groups of questions that are nearly the same text, so that a split can keep them on one side."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

SHINGLE = 6
"""Letters and digits in a row that are compared."""
MIN_SIMILARITY = 0.6
"""Share of two texts' shingles that both hold, above which they count as near duplicates."""
NUM_BANDS, ROWS_OF_BAND = 24, 4
"""Two texts of similarity 0.6 are compared with chance 1 - (1 - 0.6^4)^24 = 0.96, of 0.8 with nearly 1."""
SPELLING = re.compile(r"\\(?:left|right|text|mathrm|[dt]?frac)|[^0-9a-z]+")
"""What is left out: LaTeX that changes no meaning, and all that is neither letter nor digit."""


def near_duplicate_groups(texts: Sequence[str]) -> Int[np.ndarray, "texts"]:
    """Number the groups of texts that are linked by near duplicates, in the order of their first text.

    Source: min-hashing, Broder, On the resemblance and containment of documents, 1997.
    """
    shingles = [shingles_of(text) for text in texts]
    parents = list(range(len(texts)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    signatures = _signatures(shingles)
    for band in range(NUM_BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for place, row in enumerate(signatures[:, band * ROWS_OF_BAND : (band + 1) * ROWS_OF_BAND]):
            buckets[row.tobytes()].append(place)
        for bucket in buckets.values():
            for place in bucket[1:]:
                first, second = root(bucket[0]), root(place)
                if first != second and _are_near(shingles[bucket[0]], shingles[place]):
                    parents[max(first, second)] = min(first, second)
    roots = [root(place) for place in range(len(texts))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(roots))}
    return np.array([numbers[name] for name in roots], np.int64)


def shingles_of(text: str) -> np.ndarray:
    """Give a number for each distinct run of letters and digits (uint64), ascending; at least one."""
    letters = np.frombuffer(SPELLING.sub("", text.lower()).encode(), np.uint8).astype(np.uint64)
    letters = np.pad(letters, (0, max(SHINGLE - len(letters), 0)))
    runs = np.zeros(len(letters) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        runs = (runs << np.uint64(8)) | letters[place : place + len(runs)]
    return np.unique(runs)


def _are_near(first: np.ndarray, second: np.ndarray) -> bool:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common >= MIN_SIMILARITY * (len(first) + len(second) - common)


def _signatures(shingles: Sequence[np.ndarray]) -> np.ndarray:
    """Give the least value of each hash over each text's shingles (uint64, texts by hashes)."""
    rng = np.random.default_rng(0)
    factors = rng.integers(2**63, size=NUM_BANDS * ROWS_OF_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    signatures = np.empty((len(shingles), len(factors)), np.uint64)
    for row, runs in zip(signatures, shingles, strict=True):
        # The high bits of a product with an odd number hang on all bits below them.
        row[:] = ((runs[:, None] * factors) >> np.uint64(20)).min(axis=0)
    return signatures
