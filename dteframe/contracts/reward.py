"""Rewards: how good is each completion?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import Completion, Question


class RewardConfig(PluginConfig):
    """Options that every reward has."""

    weight: float = 1.0
    """Factor of this reward in the sum; the first reward of the list decides what a success is, whatever
    its weight."""

    @classmethod
    def example_questions(cls) -> Sequence[Question]:
        """Give at least 24 questions that it can score, for the promises; empty if small sums will do."""
        return ()


class Reward(Component):
    """How good is each completion?"""

    kind = "reward"
    config: RewardConfig

    def start(self) -> None:
        """Load what scoring needs, such as packages; called once, before the first score, and not timed.

        Processes that scoring needs are started here: one that ``score`` leaves running is killed.
        """

    @abstractmethod
    def score(self, question: Question, completions: Sequence[Completion]) -> Sequence[float | None]:
        """Score each completion of one question, in the same order; finite, usually in [0, 1].

        None says that no answer was found in the completion: it counts as 0, and is counted apart from wrong
        ones. Runs in a worker process, once or again: must not change anything, and give the same scores when
        called again, with all completions of the question or with some.
        """

    def problem_with(self, question: Question) -> str | None:
        """Say why this question can never be scored (an answer that does not parse, say), or None.

        Such questions are counted, named and left out before the run.
        """
        return None
