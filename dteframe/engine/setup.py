"""What the main process of a run has at hand and never changes while it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pluggy

from dteframe.assemble import Parts
from dteframe.contracts import Context, Policy
from dteframe.engine.canary import Canary
from dteframe.engine.member import Member, Result, Work
from dteframe.engine.meter import Meter
from dteframe.engine.pool import Pool
from dteframe.engine.streams import Streams
from dteframe.recipe import Recipe
from dteframe.records import BatchArithmetic, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Setup:
    """The parts of a run, started; what changes is inside the parts and in ``Progress``."""

    member: Member
    arithmetic: BatchArithmetic
    pool: Pool
    prompts: Mapping[str, Prompt]
    """Of training and held-out questions, by id."""
    streams: Streams
    hooks: pluggy.PluginManager
    canary: Canary | None
    """Compares sampler and trainer after updates, where the rollout's options want it."""

    def together(self, work: Work[Result]) -> Result:
        """Have every process do a work."""
        return self.member.together(work)

    @property
    def recipe(self) -> Recipe:
        """Give what was asked for."""
        return self.member.recipe

    @property
    def context(self) -> Context:
        """Give the surroundings of the components."""
        return self.member.context

    @property
    def parts(self) -> Parts:
        """Give the components."""
        return self.member.parts

    @property
    def policy(self) -> Policy:
        """Give the model in training."""
        return self.member.policy

    @property
    def meter(self) -> Meter:
        """Give the counts of tokens and seconds."""
        return self.member.meter

    @property
    def sampling(self) -> Sampling:
        """How training completions are sampled."""
        return self.recipe.rollout.sampling()
