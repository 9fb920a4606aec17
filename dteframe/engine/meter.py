"""What a run has paid: tokens and rollouts by purpose, seconds by stage. Nothing is free."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dteframe.records import Group, State
from dteframe.reports import CostReport, HealthReport, RewardReport, TimeReport

NOT_TRAINING = ("load", "evaluate", "checkpoint")
"""Stages that time to target does not count."""


class Meter:
    """Counts since the start of the run; its counts survive a checkpoint."""

    def __init__(self) -> None:
        """Start at zero."""
        self.tokens: Counter[str] = Counter()
        self.rollouts: Counter[str] = Counter()
        self.unused_tokens = 0
        """Of those charged to ``train``, in groups that a selector's review kept out of their step."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Since the start of the run, by stage, ``other`` included."""
        self.training_cpu_seconds = 0.0
        """Of this process and its threads, in the stages that time to target counts."""
        self.last_step_tokens: Counter[str] = Counter()
        """Of the step that was closed last, by purpose."""
        self.reward_statuses: Counter[str] = Counter()
        """What became of scoring completions, since the start of the run."""
        self._num_non_finite = 0
        self._last_step_non_finite = 0
        self._last_step_statuses: Counter[str] = Counter()
        self._step_statuses: Counter[str] = Counter()
        self._step_tokens: Counter[str] = Counter()
        self._step_seconds: defaultdict[str, float] = defaultdict(float)
        self._step_began = time.perf_counter()
        self._step_began_cpu = time.process_time()
        self._step_untrained_cpu = 0.0

    def charge(self, groups: Sequence[Group]) -> None:
        """Count what was generated, under its purpose."""
        for group in groups:
            self.tokens[group.purpose] += group.num_tokens
            self._step_tokens[group.purpose] += group.num_tokens
            self.rollouts[group.purpose] += group.trials
            statuses = group.reward_statuses or ("scored",) * group.trials
            self.reward_statuses.update(statuses)
            self._step_statuses.update(statuses)

    def note_non_finite(self, num_groups: int) -> None:
        """Count groups that are left out for their sampler's log-probs."""
        self._num_non_finite += num_groups

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; stages are not nested."""
        began, began_cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._step_seconds[name] += time.perf_counter() - began
            if name in NOT_TRAINING:
                self._step_untrained_cpu += time.process_time() - began_cpu

    def close_step(self) -> TimeReport:
        """End the step's times, add them to the run's, and begin the next step's."""
        now, now_cpu = time.perf_counter(), time.process_time()
        whole = now - self._step_began
        self.training_cpu_seconds += now_cpu - self._step_began_cpu - self._step_untrained_cpu
        self._step_seconds["other"] = whole - sum(self._step_seconds.values())
        figures = {f"{stage}_seconds": seconds for stage, seconds in self._step_seconds.items()}
        for stage, seconds in self._step_seconds.items():
            self.seconds[stage] += seconds
        self._step_seconds.clear()
        self.last_step_tokens, self._step_tokens = self._step_tokens, Counter()
        self._last_step_non_finite, self._num_non_finite = self._num_non_finite, 0
        self._last_step_statuses, self._step_statuses = self._step_statuses, Counter()
        self._step_began, self._step_began_cpu, self._step_untrained_cpu = now, now_cpu, 0.0
        return TimeReport(step_seconds=whole, figures=figures)

    def rewards(self) -> RewardReport:
        """Sum up what became of scoring the completions of the step that was closed last."""
        counts = self._last_step_statuses
        return RewardReport(
            num_completions=counts.total(),
            num_unparseable=counts["unparseable"],
            num_timeouts=counts["timeout"],
            num_errors=counts["error"],
        )

    def health(self) -> HealthReport:
        """Sum up what was left out of the step that was closed last."""
        return HealthReport(num_non_finite_groups=self._last_step_non_finite)

    def costs(self) -> CostReport:
        """Sum up everything paid up to the last closed step."""
        total = sum(self.seconds.values())
        return CostReport(
            train_tokens=self.tokens["train"],
            unused_tokens=self.unused_tokens,
            reference_tokens=self.tokens["reference"],
            evaluation_tokens=self.tokens["evaluation"],
            train_rollouts=self.rollouts["train"],
            reference_rollouts=self.rollouts["reference"],
            evaluation_rollouts=self.rollouts["evaluation"],
            total_seconds=total,
            training_seconds=total - sum(self.seconds[stage] for stage in NOT_TRAINING),
            training_cpu_seconds=self.training_cpu_seconds,
            reference_seconds=self.seconds["references"],
            predict_seconds=self.seconds["predict"],
            select_seconds=self.seconds["select"],
        )

    def state_dict(self) -> State:
        """Give the counts."""
        return {
            "tokens": dict(self.tokens),
            "unused_tokens": self.unused_tokens,
            "rollouts": dict(self.rollouts),
            "reward_statuses": dict(self.reward_statuses),
            "seconds": dict(self.seconds),
            "training_cpu_seconds": self.training_cpu_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.tokens = Counter(state["tokens"])
        self.unused_tokens = state["unused_tokens"]
        self.rollouts = Counter(state["rollouts"])
        self.reward_statuses = Counter(state["reward_statuses"])
        self.seconds = defaultdict(float, state["seconds"])
        self.training_cpu_seconds = state["training_cpu_seconds"]
