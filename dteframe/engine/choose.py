"""Choose questions: the selector's choice, under the rules that every selector's options hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dteframe.beta_binomial import mixed_probability, parameters
from dteframe.contracts import Selector, SelectorConfig
from dteframe.engine import calls
from dteframe.records import State, SuccessEstimate

MIN_CHANCE = 1e-12
"""Mean chances of an informative group below it are taken for it: something to divide by."""


@dataclass(slots=True)
class Uses:
    """When each question was last chosen, and how often; on the checkpoint."""

    last_step: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def note(self, question_ids: Sequence[str], step: int) -> None:
        """Count questions that are chosen at a step."""
        for name in question_ids:
            self.last_step[name] = step
            self.times[name] = self.times.get(name, 0) + 1

    def state_dict(self) -> State:
        """Give everything, as columns."""
        return {
            "question_ids": list(self.last_step),
            "last_step": np.array(list(self.last_step.values()), np.int64),
            "times": np.array([self.times[name] for name in self.last_step], np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take everything back."""
        names = state["question_ids"]
        self.last_step = {name: int(step) for name, step in zip(names, state["last_step"], strict=True)}
        self.times = {name: int(count) for name, count in zip(names, state["times"], strict=True)}


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen questions, in the order in which they are to be asked."""

    question_ids: tuple[str, ...]
    figures: Mapping[str, float]
    """How the rules had their say; empty where there are none."""
    covered: frozenset[str]
    """Those of the questions that were drawn uniformly."""
    expected_gain: float | None = None
    """How many times as many informative groups the estimate expected of the selector's choice as of a
    uniform one; None where no rule asks."""


def choose(  # noqa: PLR0913  # all that a choice depends on
    selector: Selector,
    estimate: SuccessEstimate,
    count: int,
    step: int,
    uses: Uses,
    num_generations: int,
    rng: np.random.Generator,
) -> Choice:
    """Have the selector choose among the questions that may be asked now, and note what is chosen.

    Questions that rest or are used up are left out, unless too few others are left: then those that have
    rested longest are brought back, used-up ones last. A share is drawn uniformly whatever the estimate says,
    and everything where it expects too little of the choice.
    """
    config = selector.config
    if not _has_rules(config):
        chosen = calls.select(selector, estimate, count, rng)
        uses.note(chosen, step)
        return Choice(chosen, {}, frozenset())
    estimate = estimate.in_order()
    used = [name for name in uses.last_step if _is_waiting(name, config, uses, step)]
    waiting = [estimate.question_ids[place] for place in np.sort(estimate.places(used))]
    missing = count - (len(estimate.question_ids) - len(waiting))
    order = sorted(waiting, key=lambda name: (_is_used_up(name, config, uses), uses.last_step[name]))
    brought_back = frozenset(order[: max(missing, 0)])
    free = estimate.without(frozenset(waiting) - brought_back)
    covered = _drawn(free, min(_by_chance(config.coverage_fraction * count, rng), count), rng)
    num_chosen = count - len(covered)
    others = free.without(frozenset(covered))
    chosen = calls.select(selector, others, num_chosen, rng) if num_chosen else ()
    gain = expected_gain(free, chosen, num_generations) if config.least_gain > 1 else None
    if gain is not None and gain < config.least_gain:
        chosen, covered = (), _drawn(free, count, rng)
    mixed = [*chosen, *covered]
    mixed = [mixed[place] for place in rng.permutation(len(mixed))]
    uses.note(mixed, step)
    num_back = len(brought_back.intersection(mixed))
    figures = {"brought_back_questions": float(num_back), "coverage_questions": float(len(covered))}
    return Choice(tuple(mixed), figures, frozenset(covered), gain)


def expected_gain(estimate: SuccessEstimate, chosen: Sequence[str], num_generations: int) -> float | None:
    """Say how many times as many informative groups are expected of ``chosen`` as of uniform questions.

    The chance of an informative group is the mean over the estimate's Beta distribution, so that an estimate
    without evidence expects 1. None where nothing is chosen.
    """
    if not chosen:
        return None
    estimate = estimate.in_order()
    chances = mixed_probability(*parameters(estimate.mean, estimate.evidence), num_generations)
    return float(chances[estimate.places(chosen)].mean() / max(chances.mean(), MIN_CHANCE))


def _drawn(estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> tuple[str, ...]:
    places = rng.choice(len(estimate.question_ids), min(count, len(estimate.question_ids)), replace=False)
    return tuple(estimate.question_ids[place] for place in places)


def _by_chance(share: float, rng: np.random.Generator) -> int:
    """Round up or down so that the mean is ``share``: a small choice gets its part too, now and then."""
    whole = int(share)
    return whole + int(share > whole and rng.random() < share - whole)


def _has_rules(config: SelectorConfig) -> bool:
    is_limited = config.cooldown > 0 or config.max_uses is not None
    return is_limited or config.coverage_fraction > 0 or config.least_gain > 1


def _is_waiting(name: str, config: SelectorConfig, uses: Uses, step: int) -> bool:
    return step - uses.last_step[name] < config.cooldown or _is_used_up(name, config, uses)


def _is_used_up(name: str, config: SelectorConfig, uses: Uses) -> bool:
    return config.max_uses is not None and uses.times.get(name, 0) >= config.max_uses
