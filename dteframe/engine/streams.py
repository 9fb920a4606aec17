"""Chance: one generator per (seed, step, stage), so that a draw added in one stage never shifts another."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Streams:
    """Where every draw of a run comes from; a resumed run needs no generator state."""

    seed: int

    def __call__(self, step: int, stage: str) -> np.random.Generator:
        """Make the generator of a stage; the same arguments give the same draws."""
        key = (step, zlib.crc32(stage.encode()))
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
