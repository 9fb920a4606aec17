"""A process of a run: what each has, and the work that all of them do together.

The main process leads: it alone plans, replays, reports and writes. What needs every process (answering,
updating, saving) is a frozen record that it sends to the others; then all do it, it itself too. With one
process nothing is sent, and the work is a plain call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dteframe.assemble import Parts
from dteframe.contracts import Context, Policy
from dteframe.engine import calls
from dteframe.engine.distributed import Processes
from dteframe.engine.meter import Meter
from dteframe.engine.non_finite import BrokenBatches
from dteframe.engine.optimizer import OptimizerSettings
from dteframe.engine.reward_pool import Scorer
from dteframe.engine.update import Learner
from dteframe.recipe import Recipe
from dteframe.records import CreditedGroup
from dteframe.reports import UpdateReport

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Member:
    """What every process of a run has at hand."""

    recipe: Recipe
    context: Context
    parts: Parts
    """Only rollout, rewards and objective are used in the processes that follow."""
    policy: Policy
    learner: Learner
    meter: Meter
    processes: Processes
    scorer: Scorer
    """Scores completions with the recipe's rewards, in processes of its own or here."""
    untold: list[str]
    """Warnings of a process that follows; the main one collects and tells them."""

    def together(self, work: Work[Result]) -> Result:
        """Have every process do a work; called by the main one, which gets what comes of it."""
        self.processes.broadcast(work)
        return work.do(self)

    def tell_warnings(self) -> None:
        """Have the main process tell what the others warned of; called by all."""
        for messages in self.processes.collect(tuple(self.untold)):
            for message in messages:
                self.context.warn(message)
        self.untold.clear()


class Work(ABC, Generic[Result]):
    """Something that all processes of a run do at the same time: a frozen record that can be sent."""

    @abstractmethod
    def do(self, member: Member) -> Result:
        """Do this process's part of it."""


@dataclass(frozen=True, slots=True)
class Update(Work[UpdateReport]):
    """Learn from the groups of a step."""

    credited: Sequence[CreditedGroup]
    rng: np.random.Generator

    def do(self, member: Member) -> UpdateReport:
        """Learn from this process's share of the rows."""
        return member.learner.update(self.credited, self.rng)


@dataclass(frozen=True, slots=True)
class Sync(Work[None]):
    """Let the rollout take over the new weights."""

    def do(self, member: Member) -> None:
        """Hand this process's rollout the policy."""
        with calls.running(member.parts.rollout):
            member.parts.rollout.sync(member.policy)


def join(  # noqa: PLR0913  # all that a process has, once
    recipe: Recipe,
    context: Context,
    parts: Parts,
    policy: Policy,
    meter: Meter,
    processes: Processes,
    scorer: Scorer,
    untold: list[str],
) -> Member:
    """Start what every process has, together with the others; the policy gets the main process's weights."""
    settings = OptimizerSettings.from_training(recipe.training)
    sampling, shares_module = recipe.rollout.sampling(), parts.rollout.shares_module
    skips = recipe.training.on_non_finite == "skip"
    broken_batches = BrokenBatches(context.run_folder, skips, processes, context.warn)
    learner = Learner(
        policy, parts.objective, settings, sampling, processes, shares_module, broken_batches.heed
    )
    with calls.running(parts.rollout):
        parts.rollout.start(policy)
    return Member(recipe, context, parts, policy, learner, meter, processes, scorer, untold)
