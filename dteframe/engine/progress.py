"""What changes while a run goes, apart from the parts themselves; all of it is on the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dteframe.engine.choose import Uses
from dteframe.engine.forecasts import RecentForecasts
from dteframe.engine.health import Health
from dteframe.engine.plan import Plan
from dteframe.engine.replay_guard import ReplayGuard
from dteframe.records import State
from dteframe.reports import (
    AnswerReport,
    EstimateReport,
    EvaluationReport,
    HealthReport,
    StepReport,
    UpdateReport,
)


@dataclass(slots=True)
class Progress:
    """How far a run is, and the sums that its summary is made of."""

    step: int = 0
    """Training steps done; the policy's version."""
    plan: Plan | None = None
    uses: Uses = field(default_factory=Uses)
    guard: ReplayGuard = field(default_factory=ReplayGuard)
    success_rate_before: float | None = None
    success_rate_after: float | None = None
    evaluated_step: int | None = None
    """Of ``success_rate_after``."""
    best_step: int | None = None
    """The step of the checkpoint whose policy did best on the held-out questions, the first of equals."""
    best_success_rate: float | None = None
    informative_groups: float = 0.0
    fresh_groups: int = 0
    successes: float = 0.0
    """Sum over fresh groups of their success rates."""
    first_reward: float | None = None
    rewards_vary: bool = False
    """Whether any reward of a fresh group has differed from the first."""
    reference_pearsons: list[float] = field(default_factory=list)
    forecasts: RecentForecasts = field(default_factory=RecentForecasts)
    has_advised: bool = False
    """Whether people were told that selection can hardly pay."""
    warnings: list[str] = field(default_factory=list)
    health: Health = field(default_factory=Health)
    steps_with_skips: int = 0
    """Steps in a row, up to the last, in which something that was not finite was skipped."""

    def note(self, report: StepReport) -> None:
        """Add a finished step to the sums."""
        has_skips = False
        for stage in report.stages:
            if isinstance(stage, AnswerReport):
                self.informative_groups += stage.informative_fraction * stage.num_groups
                self.fresh_groups += stage.num_groups
                self.successes += stage.success_rate * stage.num_groups
                if self.first_reward is None:
                    self.first_reward = stage.reward_mean
                self.rewards_vary |= stage.reward_std > 0 or abs(stage.reward_mean - self.first_reward) > 1e-9
            elif isinstance(stage, UpdateReport):
                has_skips |= stage.num_skipped_minibatches > 0
            elif isinstance(stage, HealthReport):
                has_skips |= stage.num_non_finite_groups > 0
            elif isinstance(stage, EstimateReport) and stage.reference_pearson is not None:
                self.reference_pearsons.append(stage.reference_pearson)
            elif isinstance(stage, EvaluationReport):
                self.note_evaluation(stage, report.step)
        self.steps_with_skips = self.steps_with_skips + 1 if has_skips else 0

    def note_evaluation(self, evaluation: EvaluationReport, step: int) -> None:
        """Keep the first and the last held-out success rate."""
        if step == 0:
            self.success_rate_before = evaluation.success_rate
        self.success_rate_after, self.evaluated_step = evaluation.success_rate, step

    def note_checkpoint(self) -> None:
        """See whether the checkpoint that is about to be written is the best one so far."""
        rate = self.success_rate_after
        if rate is None or self.evaluated_step != self.step:
            return
        if self.best_success_rate is None or rate > self.best_success_rate:
            self.best_step, self.best_success_rate = self.step, rate

    @property
    def informative_fraction(self) -> float | None:
        """Share of informative groups among all fresh groups so far."""
        return self.informative_groups / self.fresh_groups if self.fresh_groups else None

    @property
    def reference_pearson(self) -> float | None:
        """Mean correlation of predictions with the references measured next."""
        return (
            sum(self.reference_pearsons) / len(self.reference_pearsons) if self.reference_pearsons else None
        )

    def state_dict(self) -> State:
        """Give everything, as JSON values and arrays."""
        return {
            "step": self.step,
            "plan": self.plan.state_dict() if self.plan else None,
            "uses": self.uses.state_dict(),
            "guard": self.guard.state_dict(),
            "success_rate_before": self.success_rate_before,
            "success_rate_after": self.success_rate_after,
            "evaluated_step": self.evaluated_step,
            "best_step": self.best_step,
            "best_success_rate": self.best_success_rate,
            "informative_groups": self.informative_groups,
            "fresh_groups": self.fresh_groups,
            "successes": self.successes,
            "first_reward": self.first_reward,
            "rewards_vary": self.rewards_vary,
            "reference_pearsons": self.reference_pearsons,
            "forecasts": self.forecasts.state_dict(),
            "has_advised": self.has_advised,
            "warnings": self.warnings,
            "health": self.health.state_dict(),
            "steps_with_skips": self.steps_with_skips,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; warnings that came while it was read are kept behind its own."""
        new_warnings = [message for message in self.warnings if message not in state["warnings"]]
        for name, value in state.items():
            setattr(self, name, value)
        self.warnings = [*state["warnings"], *new_warnings]
        self.plan = Plan.from_state(state["plan"]) if state["plan"] else None
        self.forecasts = RecentForecasts.from_state(state["forecasts"])
        self.health = Health.from_state(state["health"])
        self.uses = Uses()
        self.uses.load_state_dict(state["uses"])
        self.guard = ReplayGuard.from_state(state["guard"])
