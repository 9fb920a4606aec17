"""The plan: which questions the next steps ask. References, observe, predict, select."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dteframe.engine import calls
from dteframe.engine.agreement import brier, pearson
from dteframe.engine.answer import answer, observation_of
from dteframe.engine.choose import Uses, choose
from dteframe.engine.setup import Setup
from dteframe.records import Group, State, SuccessEstimate
from dteframe.reports import EstimateReport, PlanReport


@dataclass(slots=True)
class Plan:
    """Questions chosen at one selection round, and how far they are used up."""

    question_ids: list[str]
    """Still to be asked, in order."""
    steps_left: int
    num_replayed: int
    """Groups that each of its steps draws from the buffer, unless the guard holds some back: decided once, so
    that all its steps are alike."""
    estimate: SuccessEstimate
    """Over the whole pool, as it was when the plan was made, with ascending ids."""
    reused: list[Group]
    """Informative reference groups that the first step trains on as fresh ones."""
    surplus: list[Group]
    """Informative reference groups beyond what the first step holds: offered to the buffer."""
    covered: frozenset[str]
    """Chosen questions that were drawn uniformly, whatever the estimate said."""

    def take(self, count: int) -> tuple[str, ...]:
        """Take the next questions off the plan."""
        taken, self.question_ids = self.question_ids[:count], self.question_ids[count:]
        return tuple(taken)

    def state_dict(self) -> State:
        """Give everything, as JSON values and arrays."""
        return {
            "question_ids": self.question_ids,
            "steps_left": self.steps_left,
            "num_replayed": self.num_replayed,
            "estimate_ids": list(self.estimate.question_ids),
            "estimate_mean": self.estimate.mean,
            "estimate_evidence": self.estimate.evidence,
            "estimate_figures": dict(self.estimate.figures),
            "reused": [group.to_state() for group in self.reused],
            "surplus": [group.to_state() for group in self.surplus],
            "covered": sorted(self.covered),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Plan:
        """Rebuild the plan of ``state_dict``."""
        estimate = SuccessEstimate(
            tuple(state["estimate_ids"]),
            state["estimate_mean"],
            state["estimate_evidence"],
            state["estimate_figures"],
            is_ascending=True,
        )
        return cls(
            list(state["question_ids"]),
            state["steps_left"],
            state["num_replayed"],
            estimate,
            [Group.from_state(group) for group in state["reused"]],
            [Group.from_state(group) for group in state["surplus"]],
            frozenset(state["covered"]),
        )


def make_plan(
    setup: Setup, step: int, last_estimate: SuccessEstimate | None, uses: Uses, num_replayed: int
) -> tuple[Plan, EstimateReport, tuple[Group, ...]]:
    """Choose the questions of the steps from ``step`` on; may roll out reference questions.

    ``last_estimate`` is the previous plan's, to be judged on the references measured now; ``uses`` gets what
    is chosen; ``num_replayed`` groups of each step are replayed if the buffer holds as many. Gives the
    references too.
    """
    parts, meter, version = setup.parts, setup.meter, step - 1
    references = _measured_references(setup, step)
    with meter.stage("predict"):
        if references:
            with calls.running(parts.estimator):
                parts.estimator.observe(observation_of(references, "reference"))
        estimate = setup.pool.in_order(calls.predict(parts.estimator, version, setup.pool.train))
    arithmetic = setup.arithmetic
    if calls.num_ready(parts.replay, version) < num_replayed:
        num_replayed = 0
    num_fresh = arithmetic.questions_per_step - num_replayed
    reusable = [
        group for group in references if group.is_informative and setup.recipe.training.reuse_references
    ]
    reused, surplus = reusable[:num_fresh], reusable[num_fresh:]
    with meter.stage("select"):
        candidates = estimate.without(frozenset(group.question_id for group in reused))
        first, later = arithmetic.num_asked(num_fresh - len(reused)), arithmetic.num_asked(num_fresh)
        count = first + later * (arithmetic.selection_interval - 1)
        uses.note([group.question_id for group in reused], step)
        rng = setup.streams(step, "select")
        choice = choose(parts.selector, candidates, count, step, uses, arithmetic.num_generations, rng)
    of_choice = dict(choice.figures)
    if choice.expected_gain is not None:
        of_choice["expected_gain"] = choice.expected_gain
    chosen, estimate = choice.question_ids, replace(estimate, figures={**estimate.figures, **of_choice})
    interval = arithmetic.selection_interval
    plan = Plan(list(chosen), interval, num_replayed, estimate, reused, surplus, choice.covered)
    estimate_of_chosen = estimate.restricted(chosen)
    figures = _figures(plan, estimate_of_chosen, references, last_estimate)
    report = PlanReport(
        step=step,
        question_ids=chosen,
        reused_reference_ids=tuple(group.question_id for group in reused),
        estimate=estimate_of_chosen,
        figures=figures,
    )
    setup.hooks.hook.dteframe_plan_made(plan=report)
    return plan, figures, references


def agreement_with(
    estimate: SuccessEstimate | None, groups: tuple[Group, ...]
) -> tuple[float | None, float | None]:
    """Compare predictions with what was measured afterwards: correlation, mean squared difference."""
    if estimate is None or not groups or not estimate.evidence.any():
        return None, None
    predicted = estimate.restricted(tuple(group.question_id for group in groups)).mean
    measured = np.array([group.success_rate for group in groups])
    return pearson(predicted, measured), brier(predicted, measured)


def _measured_references(setup: Setup, step: int) -> tuple[Group, ...]:
    with setup.meter.stage("references"):
        ids = calls.references(setup.parts.estimator, setup.streams(step, "references"), setup.pool.train)
    if not ids:
        return ()
    return answer(setup, ids, "reference", step, setup.streams(step, "reference_answers"))


def _figures(
    plan: Plan, chosen: SuccessEstimate, references: tuple[Group, ...], last: SuccessEstimate | None
) -> EstimateReport:
    correlation, squared = agreement_with(last, references)
    rates = [group.success_rate for group in references]
    return EstimateReport(
        num_references=len(references),
        reference_success_rate=float(np.mean(rates)) if rates else None,
        reference_informative_fraction=(
            float(np.mean([group.is_informative for group in references])) if references else None
        ),
        reference_pearson=correlation,
        reference_brier=squared,
        mean_success_rate=float(plan.estimate.mean.mean()),
        selected_mean_success_rate=float(chosen.mean.mean()) if chosen.question_ids else None,
        num_selected=len(chosen.question_ids),
        num_reused_references=len(plan.reused),
        figures=plan.estimate.figures,
    )
