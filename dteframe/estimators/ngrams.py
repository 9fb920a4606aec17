"""Embeddings without a model: which runs of characters and of words a text holds, hashed to a fixed width.

They tell what a text is made of (operators, subjects, how a source words its questions), nothing of what it
means. A millisecond is enough for some texts, and nothing has to be installed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

CHARACTERS = (3, 4)
"""Lengths of the runs of bytes that are counted, in lower case and with single spaces."""
WORDS = (1, 2)
"""Lengths of the runs of words that are counted."""
WORD = re.compile(r"\\[a-z]+|[^\W\d_]+|\d|[^\s\w]|_")
"""A LaTeX command, letters, one digit or one sign."""
PRIME = np.uint64(1099511628211)
"""Of FNV-1a; any large odd number spreads runs over 64 bits."""


def ngram_embeddings(texts: Sequence[str], width: int) -> Float[np.ndarray, "texts width"]:
    """Count every text's runs into ``width`` places, with signs, and scale rows to length 1.

    A run that occurs n times counts 1 + log(n). Two runs in one place add up with random signs, so that
    products of rows are, on average, those of the unhashed counts.

    Source: feature hashing, Weinberger et al., arXiv:0902.2206.
    """
    matrix = np.zeros((len(texts), width), np.float32)
    for row, text in zip(matrix, texts, strict=True):
        runs, counts = np.unique(_scrambled(_runs_of(text)), return_counts=True)
        signs = np.where(runs & np.uint64(1), 1.0, -1.0)
        places = (runs >> np.uint64(32)) % np.uint64(width)
        np.add.at(row, places.astype(np.int64), ((1 + np.log(counts)) * signs).astype(np.float32))
        row /= max(float(np.linalg.norm(row)), 1e-12)
    return matrix


def _runs_of(text: str) -> np.ndarray:
    """Give a 64-bit number for every run in a text, as often as it occurs (uint64)."""
    lower = " ".join(text.lower().split())
    letters = np.frombuffer(f" {lower} ".encode(), np.uint8).astype(np.uint64)
    words = np.array([zlib.crc32(word.encode()) for word in WORD.findall(lower)], np.uint64)
    pieces = [_runs(letters, length, length) for length in CHARACTERS]
    pieces += [_runs(words, length, 100 + length) for length in WORDS]
    return np.concatenate(pieces)


def _runs(symbols: np.ndarray, length: int, kind: int) -> np.ndarray:
    """Combine each symbol with the ``length - 1`` that follow it; ``kind`` keeps lengths apart."""
    count = max(len(symbols) - length + 1, 0)
    combined = np.full(count, kind, np.uint64)
    for place in range(length):
        combined = combined * PRIME + symbols[place : place + count]
    return combined


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """Spread the last bits over all: the finaliser of MurmurHash3."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(factor)
    return np.asarray(numbers ^ (numbers >> np.uint64(33)))
