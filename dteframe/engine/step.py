"""One step: ask, answer, score, learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dteframe.engine import calls
from dteframe.engine.answer import answer, observation_of, tell
from dteframe.engine.choose import Uses, choose
from dteframe.engine.member import Sync, Update
from dteframe.engine.plan import Plan, agreement_with, make_plan
from dteframe.engine.progress import Progress
from dteframe.engine.setup import Setup
from dteframe.records import CreditedGroup, Group
from dteframe.reports import AnswerReport, ReplayReport, StageReport


def training_step(setup: Setup, progress: Progress) -> tuple[StageReport, ...]:
    """Do the step after ``progress.step``, top to bottom, and say how it went."""
    step, parts = progress.step + 1, setup.parts
    reports: list[StageReport] = []
    if progress.plan is None or progress.plan.steps_left == 0:
        last_estimate = progress.plan.estimate if progress.plan else None
        progress.plan, figures = make_plan(setup, step, last_estimate, progress.uses)
        reports.append(figures)
    plan = progress.plan
    reused, surplus = tuple(plan.reused), tuple(plan.surplus)
    fresh_ids = plan.take(setup.arithmetic.questions_per_step - plan.num_replayed - len(reused))
    replayed, replay_report = _draw(setup, plan, step, fresh_ids)
    shortfall_ids = _stand_ins(setup, plan, step, fresh_ids, replayed, progress.uses)
    answered = answer(setup, fresh_ids + shortfall_ids, "train", step, setup.streams(step, "answers"))
    fresh = reused + answered
    with setup.meter.stage("replay"):
        if answered:
            with calls.running(parts.estimator):
                parts.estimator.observe(observation_of(answered, "train"))
        with calls.running(parts.replay):
            parts.replay.offer([*surplus, *fresh])
    with setup.meter.stage("update"):
        credited = [_credited(setup, group, step, is_replayed=False) for group in fresh]
        credited += [_credited(setup, group, step, is_replayed=True) for group in replayed]
        update = setup.together(Update(credited, setup.streams(step, "update")))
        setup.together(Sync())
    reports += [_answer_report(plan, fresh, answered, len(shortfall_ids)), replay_report, update]
    plan.reused, plan.surplus = [], []
    plan.steps_left -= 1
    progress.step = step
    return tuple(reports)


def _draw(
    setup: Setup, plan: Plan, step: int, fresh_ids: tuple[str, ...]
) -> tuple[tuple[Group, ...], ReplayReport]:
    """Draw earlier groups before the step's own are offered: none is replayed in its own step."""
    version, replay = step - 1, setup.parts.replay
    with setup.meter.stage("replay"):
        num_ready = calls.num_ready(replay, version)
        excluded = frozenset(fresh_ids) | {group.question_id for group in plan.reused}
        rng = setup.streams(step, "replay")
        groups = calls.draw(replay, plan.num_replayed, version, excluded, rng) if plan.num_replayed else ()
    if groups:
        tell(setup, step, groups, is_replayed=True)
    staleness = [version - group.policy_version for group in groups]
    report = ReplayReport(
        num_groups=len(groups),
        num_ready=num_ready,
        staleness_mean_steps=float(np.mean(staleness)) if staleness else None,
        staleness_max_steps=max(staleness, default=None),
    )
    return groups, report


def _stand_ins(
    setup: Setup,
    plan: Plan,
    step: int,
    fresh_ids: tuple[str, ...],
    replayed: Sequence[Group],
    uses: Uses,
) -> tuple[str, ...]:
    """Choose questions for groups that the buffer could not give: a step always has all its groups."""
    shortfall = plan.num_replayed - len(replayed)
    if shortfall == 0:
        return ()
    taken = {*fresh_ids, *plan.question_ids, *(group.question_id for group in [*plan.reused, *replayed])}
    with setup.meter.stage("select"):
        candidates = plan.estimate.without(frozenset(taken))
        rng = setup.streams(step, "stand_ins")
        return choose(setup.parts.selector, candidates, shortfall, step, uses, rng).question_ids


def _credited(setup: Setup, group: Group, step: int, *, is_replayed: bool) -> CreditedGroup:
    advantages = calls.advantages(setup.parts.objective, group)
    return CreditedGroup(group, advantages, is_replayed, staleness=step - 1 - group.policy_version)


def _answer_report(
    plan: Plan, fresh: tuple[Group, ...], answered: tuple[Group, ...], num_stand_ins: int
) -> AnswerReport:
    rewards = np.concatenate([group.rewards for group in fresh])
    lengths = [len(completion.token_ids) for group in fresh for completion in group.completions]
    cut = [completion.finish_reason == "length" for group in fresh for completion in group.completions]
    correlation, squared = agreement_with(plan.estimate, answered)
    return AnswerReport(
        num_groups=len(fresh),
        num_shortfall_groups=num_stand_ins,
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        success_rate=sum(group.successes for group in fresh) / sum(group.trials for group in fresh),
        informative_fraction=float(np.mean([group.is_informative for group in fresh])),
        equal_reward_fraction=float(np.mean([group.has_equal_rewards for group in fresh])),
        predicted_pearson=correlation,
        predicted_brier=squared,
        completion_length_mean_tokens=float(np.mean(lengths)),
        completion_length_max_tokens=max(lengths),
        truncated_fraction=float(np.mean(cut)),
    )
