"""The hooks: one adds plugins, the others watch a run and return nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from dteframe.contracts import Component
from dteframe.reports import EvaluationReport, GroupsReport, PlanReport, RunReport, RunSummary, StepReport

hookspec = pluggy.HookspecMarker("dteframe")
hookimpl = pluggy.HookimplMarker("dteframe")


@hookspec
def dteframe_components() -> Sequence[type[Component]]:  # type: ignore[empty-body]  # a hook specification has no body
    """Give the plugin classes of this module."""


@hookspec
def dteframe_run_started(run: RunReport) -> None:
    """Learn that everything is loaded and the first step is next."""


@hookspec
def dteframe_progress(what: str, done: int, total: int) -> None:
    """Learn how far long work is inside a stage: loading, warming up, embedding, generating."""


@hookspec
def dteframe_warned(message: str) -> None:
    """Learn of something that was skipped, replaced or looks wrong."""


@hookspec
def dteframe_plan_made(plan: PlanReport) -> None:
    """Learn which questions come next, and why."""


@hookspec
def dteframe_groups_scored(groups: GroupsReport) -> None:
    """See completions and their rewards: references, fresh and replayed groups, evaluation."""


@hookspec
def dteframe_evaluated(step: int, evaluation: EvaluationReport) -> None:
    """Learn the held-out success rate."""


@hookspec
def dteframe_step_finished(report: StepReport) -> None:
    """Get the row of metrics of a step; step 0 is the evaluation before training."""


@hookspec
def dteframe_run_finished(summary: RunSummary) -> None:
    """Learn how the run ended; not called when it fails."""
