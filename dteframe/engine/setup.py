"""What a run has at hand and never changes while it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy

from dteframe.assemble import Parts
from dteframe.contracts import Context, Policy
from dteframe.engine.meter import Meter
from dteframe.engine.pool import Pool
from dteframe.engine.streams import Streams
from dteframe.recipe import Recipe
from dteframe.records import BatchArithmetic, Prompt, Sampling

if TYPE_CHECKING:
    from dteframe.engine.update import Learner


@dataclass(frozen=True, slots=True)
class Setup:
    """The parts of a run, started; what changes is inside the parts and in ``Progress``."""

    recipe: Recipe
    arithmetic: BatchArithmetic
    context: Context
    parts: Parts
    pool: Pool
    prompts: Mapping[str, Prompt]
    """Of training and held-out questions, by id."""
    policy: Policy
    learner: Learner
    streams: Streams
    meter: Meter
    hooks: pluggy.PluginManager

    @property
    def sampling(self) -> Sampling:
        """How training completions are sampled."""
        return self.recipe.rollout.sampling()
