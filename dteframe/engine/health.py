"""Signs that a run goes wrong: each is told when it begins, and again when it is back after it was gone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from dteframe.recipe.health_config import HealthConfig
from dteframe.records import State
from dteframe.reports import MetricValue, StepReport

RECENT, LONG = 5, 10
"""Steps that figures are averaged over: one alone is noise; success rates of few questions take more."""
BEFORE = 20
"""Steps that a sudden change is held against."""
NUM_FIRST = 10
"""Steps at the start whose entropy later ones are held against."""
NUM_CALM = 5
"""Steps (or evaluations) without a sign after which it is over."""
NUM_STANDARD_ERRORS = 3
"""Of a fall of the success rate: a smaller one may be chance."""
KEPT = RECENT + BEFORE
ENTROPY = "update/entropy_nats"
SUCCESS = "answer/success_rate"
EVALUATION = "evaluation/success_rate"
LENGTH = "answer/completion_length_mean_tokens"
TRUNCATED = "answer/truncated_fraction"
EQUAL = "answer/equal_reward_fraction"
GRADIENT = "update/gradient_norm"
SUCCESS_RATES = ((SUCCESS, LONG, "answer/num_groups"), (EVALUATION, 1, "evaluation/num_questions"))
"""With the number of steps that each is averaged over, and what counts the questions of a step."""
WATCHED = (
    *(ENTROPY, LENGTH, TRUNCATED, EQUAL, GRADIENT),
    *(name for rate, _, questions in SUCCESS_RATES for name in (rate, questions)),
    *(f"update/{whose}_effective_sample_fraction" for whose in ("fresh", "replayed")),
)
"""Metrics that are remembered."""


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that looks wrong at a step."""

    name: str
    """The metric that shows it."""
    what: str
    """What is so, with value and limit, and what to do."""


@dataclass(slots=True)
class Health:
    """Remembers as much of a run's figures as its signs need; on the checkpoint."""

    recent: dict[str, list[float]] = field(default_factory=dict)
    """The last figures of each kind, the latest last."""
    first_entropies: list[float] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    """The best average of each success rate."""
    has_signal: bool = False
    """Whether the rewards of any group have differed: a run in which none ever did is told of otherwise."""
    calm_steps: dict[str, int] = field(default_factory=dict)
    """Of each sign that has begun, the steps since it was last seen; those without its metric say nothing."""

    def look_at(self, report: StepReport, limits: HealthConfig) -> Iterator[str]:
        """Take in a finished step, and word what begins to look wrong."""
        figures = report.metrics()
        if not figures.get("update/num_optimizer_steps"):
            figures.pop("update/gradient_norm", None)  # There was no gradient, which is not a norm of 0.
        self._note(figures)
        seen = {sign.name: sign.what for sign in self._signs(figures, limits)}
        for name, what in seen.items():
            if name not in self.calm_steps:
                yield f"step {report.step}: {what}"
            self.calm_steps[name] = 0
        for name in [name for name in self.calm_steps if name in figures and name not in seen]:
            self.calm_steps[name] += 1
            if self.calm_steps[name] >= NUM_CALM:
                del self.calm_steps[name]

    def state_dict(self) -> State:
        """Give everything, as JSON values."""
        return {
            "recent": self.recent,
            "first_entropies": self.first_entropies,
            "best": self.best,
            "has_signal": self.has_signal,
            "calm_steps": self.calm_steps,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Health:
        """Take everything back."""
        return cls(**state)

    def _note(self, figures: Mapping[str, MetricValue]) -> None:
        for name in WATCHED:
            value = figures.get(name)
            if value is None or not math.isfinite(value):
                continue
            values = self.recent.setdefault(name, [])
            values.append(float(value))
            del values[:-KEPT]
            if name == ENTROPY and len(self.first_entropies) < NUM_FIRST:
                self.first_entropies.append(float(value))

    def _signs(self, figures: Mapping[str, MetricValue], limits: HealthConfig) -> Iterator[Sign]:
        """Give what looks wrong now; only figures that the step has can."""
        if ENTROPY in figures:
            yield from self._entropy(limits.entropy_fraction)
        for name, number, questions in SUCCESS_RATES:
            if name in figures:
                yield from self._success(name, number, questions, limits.success_fraction)
        for whose in ("fresh", "replayed"):
            if f"update/{whose}_effective_sample_fraction" in figures:
                yield from self._effective_sample(whose, limits.effective_sample_fraction)
        if LENGTH in figures:
            yield from self._length(limits.length_ratio)
            yield from self._truncated(limits.truncated_fraction)
            yield from self._equal_rewards(limits.steps_of_equal_rewards)
        if GRADIENT in figures:
            yield from self._gradient(limits.gradient_norm_ratio)

    def _last(self, name: str, number: int) -> list[float]:
        """Give the last figures, or none if there are fewer."""
        values = self.recent.get(name, [])
        return values[-number:] if len(values) >= number else []

    def _entropy(self, fraction: float | None) -> Iterator[Sign]:
        values = self._last(ENTROPY, RECENT)
        if fraction is None or not values or len(self.first_entropies) < NUM_FIRST:
            return
        now, then = fmean(values), fmean(self.first_entropies)
        if now < fraction * then:
            yield Sign(
                ENTROPY,
                f"entropy has collapsed: {now:.3g} nats over {RECENT} steps, {then:.3g} over the first "
                f"{NUM_FIRST}, and {fraction:g} of that is the limit (training.health.entropy_fraction); "
                "the policy hardly varies its answers any more: lower training.learning_rate, or raise "
                "objective.epsilon_high or rollout.temperature",
            )

    def _success(self, name: str, number: int, questions: str, fraction: float | None) -> Iterator[Sign]:
        values, num_questions = self._last(name, number), sum(self._last(questions, number))
        if fraction is None or not values or not num_questions:
            return
        now = fmean(values)
        best = self.best[name] = max(now, self.best.get(name, 0.0))
        # At most: the answers to one question vary less than those to as many.
        standard_error = math.sqrt((best * (1 - best) + now * (1 - now)) / num_questions)
        if now < fraction * best and best - now > NUM_STANDARD_ERRORS * standard_error:
            which = f"that of training over {number} steps" if name == SUCCESS else "that of the evaluation"
            yield Sign(
                name,
                f"the success rate has collapsed: {which} is {now:.3g}, its best was {best:.3g}, and "
                f"{fraction:g} of that is the limit (training.health.success_fraction); look at the latest "
                "rollouts, lower training.learning_rate, or go back to an earlier checkpoint",
            )

    def _effective_sample(self, whose: str, limit: float | None) -> Iterator[Sign]:
        name = f"update/{whose}_effective_sample_fraction"
        values = self._last(name, RECENT)
        if limit is None or not values or fmean(values) >= limit:
            return
        advice = (
            "sampler and trainer differ: see canary/ in metrics.jsonl, let both compute in the same type"
            if whose == "fresh"
            else "replayed groups are too old: lower replay.capacity, or raise training.fresh_fraction"
        )
        yield Sign(
            name,
            f"importance weights are uneven: of the {whose} tokens of {RECENT} steps a share of "
            f"{fmean(values):.3g} counts (effective sample size), and {limit:g} is the limit "
            f"(training.health.effective_sample_fraction); {advice}",
        )

    def _length(self, ratio: float | None) -> Iterator[Sign]:
        values = self._last(LENGTH, RECENT + BEFORE)
        if ratio is None or not values:
            return
        now, before = fmean(values[-RECENT:]), fmean(values[:-RECENT])
        if now > ratio * before:
            yield Sign(
                LENGTH,
                f"completions explode: {now:.4g} tokens over {RECENT} steps, {before:.4g} over the {BEFORE} "
                f"before, and {ratio:g} times that is the limit (training.health.length_ratio); look at the "
                "latest rollouts for repetition, and whether objective.loss_type rewards length",
            )

    def _truncated(self, limit: float | None) -> Iterator[Sign]:
        values = self._last(TRUNCATED, RECENT)
        if limit is not None and values and fmean(values) >= limit:
            yield Sign(
                TRUNCATED,
                f"nearly all completions are cut: {fmean(values):.3g} of those of {RECENT} steps, and "
                f"{limit:g} is the limit (training.health.truncated_fraction); raise "
                "rollout.max_completion_length, or see whether the model ever gives its end token",
            )

    def _equal_rewards(self, number: int | None) -> Iterator[Sign]:
        values = self._last(EQUAL, number) if number is not None else []
        self.has_signal |= self.recent.get(EQUAL, [1.0])[-1] < 1
        if values and min(values) == 1 and self.has_signal:
            yield Sign(
                EQUAL,
                f"in {number} steps in a row the rewards of every group are all equal "
                "(training.health.steps_of_equal_rewards), so nothing is learnt any more; look at the latest "
                "rollouts, or ask questions of moderate difficulty (selector.type difficulty_target)",
            )

    def _gradient(self, ratio: float | None) -> Iterator[Sign]:
        values = self.recent.get(GRADIENT, [])
        before = values[-BEFORE - 1 : -1]
        if ratio is None or len(before) < LONG:
            return
        now, usual = values[-1], median(before)
        if now > ratio * usual:
            yield Sign(
                GRADIENT,
                f"the gradient norm jumps: {now:.3g}, where the median of {len(before)} steps before is "
                f"{usual:.3g}, and {ratio:g} times that is the limit (training.health.gradient_norm_ratio); "
                "once is harmless (training.max_grad_norm); if it returns, lower training.learning_rate",
            )
