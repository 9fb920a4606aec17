"""Skip questions whose last groups were all right or all wrong, the likelier the more there were: GRESO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Observation,
    Selection,
    Selector,
    SelectorConfig,
    SuccessEstimate,
    hookimpl,
)
from dteframe.records import State

LEAST_CHANCE_TO_ASK = 0.01
"""However long a streak is: a question is never given up."""
STEP_OF_BASE = 0.01
LEAST_BASE, LARGEST_BASE = 0.05, 0.95


class SkipZeroVarianceConfig(SelectorConfig):
    """Options of ``skip_zero_variance``."""

    type: Literal["skip_zero_variance"] = "skip_zero_variance"
    target_fraction: float = Field(default=0.25, ge=0, le=1)
    """Share of groups without both successes and failures that is aimed at; a third of it for those that are
    all right, two thirds for those that are all wrong. Above it more is skipped, below it less."""
    initial_base: float = Field(default=0.5, ge=LEAST_BASE, le=LARGEST_BASE)
    """Chance at the start that a question is asked again after one group without both; after z of them it is
    this to the power of z."""


@final
class SkipZeroVarianceSelector(Selector):
    """Go through the pool in random order; skip a question with chance 1 - base^z.

    z is the number of the question's latest groups, in a row, that were all right, or all wrong. Each of the
    two has a base of its own; both are steered by the shares of such groups. A skipped question has had its
    turn in the epoch.

    Source: GRESO, arXiv:2506.02177, with the bounds of its released code: base in [0.05, 0.95], a chance of
        at least 0.01. That code calls rates of 0.98 and more all right, of 0.11 and less all wrong; here they
        are just that. It fills a step by dynamic sampling in batches of fitted size; here a step is what was
        asked, equal rewards or not.
    """

    config: SkipZeroVarianceConfig
    needs_estimate: ClassVar[bool] = False

    def __init__(self, config: SkipZeroVarianceConfig, context: Context) -> None:
        """Start the first epoch: nothing is known, nothing is skipped."""
        super().__init__(config, context)
        self._passed: set[str] = set()  # had their turn in this epoch: asked or skipped
        self._is_first_epoch = True
        self._streaks: dict[str, int] = {}  # z above 0 for all right, -z for all wrong
        self._base_easy = self._base_hard = config.initial_base

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose what is not skipped, pass after pass over the pool until there are ``count``."""
        pool = estimate.in_order().question_ids
        if count > len(pool):
            raise ValueError(
                f"skip_zero_variance: asked for {count} of {len(pool)} questions; at most all of them can be "
                "given"
            )
        # The pass in which a question would first be asked is geometric: tossing coins for pass after pass
        # comes to the same. What has had its turn in this epoch waits for the next pass.
        turns = rng.permutation(len(pool))
        has_passed = np.array([name in self._passed for name in pool], bool)
        first_pass = rng.geometric(self._chances_to_ask(pool)) + has_passed
        order = np.lexsort((turns, first_pass))
        chosen = [pool[place] for place in order[:count]]
        if count:
            last = order[count - 1]
            turned = {pool[place] for place in np.flatnonzero(turns <= turns[last])}
            if first_pass[last] == 1:
                self._passed |= turned
            else:
                # What was chosen in an earlier pass keeps its turn in the epoch that has begun.
                earlier = order[:count][first_pass[order[:count]] < first_pass[last]]
                self._passed = turned - {pool[place] for place in earlier}
                self._is_first_epoch = False
        return Selection(tuple(chosen[place] for place in rng.permutation(count)))

    def observe(self, observation: Observation) -> None:
        """Lengthen or end the questions' streaks, and steer the bases by the step's shares."""
        counts = zip(observation.question_ids, observation.successes, observation.trials, strict=True)
        for name, successes, trials in counts:
            sign = 1 if successes == trials else -1 if successes == 0 else 0
            streak = self._streaks.get(name, 0)
            self._streaks[name] = streak + sign if streak * sign > 0 else sign
            if sign == 0:
                del self._streaks[name]
        if not self._is_first_epoch:
            easy = float(np.mean(observation.successes == observation.trials))
            hard = float(np.mean(observation.successes == 0))
            self._base_easy = steered(self._base_easy, easy, self.config.target_fraction / 3)
            self._base_hard = steered(self._base_hard, hard, self.config.target_fraction * 2 / 3)

    def state_dict(self) -> State:
        """Give the epoch, the streaks and the bases."""
        names = sorted(self._streaks)
        return {
            "passed": sorted(self._passed),
            "is_first_epoch": self._is_first_epoch,
            "streak_ids": names,
            "streaks": np.array([self._streaks[name] for name in names], np.int64),
            "base_easy": self._base_easy,
            "base_hard": self._base_hard,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take all of it back."""
        self._passed = set(state["passed"])
        self._is_first_epoch = state["is_first_epoch"]
        self._streaks = dict(zip(state["streak_ids"], state["streaks"].tolist(), strict=True))
        self._base_easy, self._base_hard = state["base_easy"], state["base_hard"]

    def _chances_to_ask(self, pool: tuple[str, ...]) -> Float[np.ndarray, "questions"]:
        streaks = np.array([self._streaks.get(name, 0) for name in pool], np.int64)
        bases = np.where(streaks > 0, self._base_easy, self._base_hard)
        chances: Float[np.ndarray, "questions"] = np.maximum(bases ** np.abs(streaks), LEAST_CHANCE_TO_ASK)
        return chances


def steered(base: float, fraction: float, target: float) -> float:
    """Lower a base where there are too many groups of its kind, raise it where there are few.

    >>> steered(0.5, 0.2, 0.1), steered(0.5, 0.05, 0.1), steered(0.05, 1.0, 0.1)
    (0.49, 0.51, 0.05)
    """
    moved = base - STEP_OF_BASE if fraction >= target else base + STEP_OF_BASE
    return min(max(moved, LEAST_BASE), LARGEST_BASE)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [SkipZeroVarianceSelector]
