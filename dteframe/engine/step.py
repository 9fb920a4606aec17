"""One step: ask, answer, score, learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from dteframe.engine import calls
from dteframe.engine.answer import observation_of, tell
from dteframe.engine.choose import Uses
from dteframe.engine.member import Sync, Update
from dteframe.engine.plan import Plan, agreement_with, make_plan
from dteframe.engine.progress import Progress
from dteframe.engine.rounds import Rounds, Spare, ask_in_rounds
from dteframe.engine.setup import Setup
from dteframe.records import CreditedGroup, Group
from dteframe.reports import AnswerReport, ReplayReport, StageReport


def training_step(setup: Setup, progress: Progress) -> tuple[StageReport, ...]:
    """Do the step after ``progress.step``, top to bottom, and say how it went."""
    step, parts = progress.step + 1, setup.parts
    reports: list[StageReport] = []
    num_allowed = progress.guard.allowed(setup.arithmetic.num_replayed, step, parts.replay.config)
    if progress.plan is None or progress.plan.steps_left == 0:
        last_estimate = progress.plan.estimate if progress.plan else None
        progress.plan, figures, references = make_plan(setup, step, last_estimate, progress.uses, num_allowed)
        progress.forecasts.note(last_estimate, references, np.ones(len(references), bool))
        reports.append(figures)
    plan = progress.plan
    reused, surplus = tuple(plan.reused), tuple(plan.surplus)
    num_wanted = setup.arithmetic.questions_per_step - plan.num_replayed - len(reused)
    fresh_ids = plan.take(setup.arithmetic.num_asked(num_wanted))
    num_drawn = min(plan.num_replayed, num_allowed)
    replayed, replay_report = _draw(setup, plan, step, fresh_ids, num_drawn, progress.guard.share)
    num_stand_ins = plan.num_replayed - len(replayed)
    spare = _spare(plan, fresh_ids, replayed, progress.uses)
    num_more = setup.arithmetic.num_asked(num_wanted + num_stand_ins) - len(fresh_ids)
    fresh_ids += spare.choose(setup, step, num_more, "stand_ins")
    rounds = ask_in_rounds(setup, step, fresh_ids, num_wanted + num_stand_ins, spare)
    fresh = (*reused, *rounds.accepted)
    is_uniform = _drawn_uniformly(setup, plan, spare, rounds.groups)
    progress.forecasts.note(plan.estimate, rounds.groups, is_uniform)
    with setup.meter.stage("replay"):
        if rounds.groups:
            observation = observation_of(rounds.groups, "train")
            with calls.running(parts.estimator):
                parts.estimator.observe(observation)
            with calls.running(parts.selector):
                parts.selector.observe(observation)
        with calls.running(parts.replay):
            parts.replay.offer([*surplus, *fresh, *rounds.surplus])
    with setup.meter.stage("update"):
        credited = [_credited(setup, group, step, is_replayed=False) for group in fresh]
        credited += [_credited(setup, group, step, is_replayed=True) for group in replayed]
        update = setup.together(Update(credited, setup.streams(step, "update")))
        setup.together(Sync())
    warning = progress.guard.note(step, update.figures, parts.replay.config)
    if warning:
        setup.context.warn(warning)
    reports += [_answer_report(plan, reused, rounds, num_stand_ins, spare), replay_report, update]
    reports.append(progress.forecasts.report())
    if parts.selector.reviews:
        reports.append(rounds.report())
        setup.meter.unused_tokens += rounds.num_unused_tokens
    plan.reused, plan.surplus = [], []
    plan.steps_left -= 1
    progress.step = step
    return tuple(reports)


def _draw(
    setup: Setup, plan: Plan, step: int, fresh_ids: tuple[str, ...], count: int, guard_share: float
) -> tuple[tuple[Group, ...], ReplayReport]:
    """Draw earlier groups before the step's own are offered: none is replayed in its own step."""
    version, replay = step - 1, setup.parts.replay
    with setup.meter.stage("replay"):
        num_ready = calls.num_ready(replay, version)
        excluded = frozenset(fresh_ids) | {group.question_id for group in plan.reused}
        rng = setup.streams(step, "replay")
        groups = calls.draw(replay, count, version, excluded, rng, setup.pool.train) if count else ()
    if groups:
        tell(setup, step, groups, is_replayed=True)
    staleness = [version - group.policy_version for group in groups]
    report = ReplayReport(
        num_groups=len(groups),
        num_ready=num_ready,
        guard_share=guard_share if replay.replays else None,
        staleness_mean_steps=float(np.mean(staleness)) if staleness else None,
        staleness_max_steps=max(staleness, default=None),
    )
    return groups, report


def _spare(plan: Plan, fresh_ids: tuple[str, ...], replayed: Sequence[Group], uses: Uses) -> Spare:
    """Give the questions that neither this step nor the next ones of its plan have already."""
    groups = [*plan.reused, *replayed]
    taken = {*fresh_ids, *plan.question_ids, *(group.question_id for group in groups)}
    return Spare(plan.estimate, taken, uses)


def _credited(setup: Setup, group: Group, step: int, *, is_replayed: bool) -> CreditedGroup:
    advantages = calls.advantages(setup.parts.objective, group)
    return CreditedGroup(group, advantages, is_replayed, staleness=step - 1 - group.policy_version)


def _drawn_uniformly(
    setup: Setup, plan: Plan, spare: Spare, groups: Sequence[Group]
) -> Bool[np.ndarray, "groups"]:
    """Say which groups were not chosen by what the estimate said of them."""
    if setup.parts.selector.needs_estimate and not plan.estimate.evidence.any():
        return np.ones(len(groups), bool)
    covered = plan.covered | spare.covered
    return np.array([group.question_id in covered for group in groups], bool)


def _answer_report(
    plan: Plan, reused: tuple[Group, ...], rounds: Rounds, num_stand_ins: int, spare: Spare
) -> AnswerReport:
    fresh, answered = (*reused, *rounds.groups), tuple(rounds.groups)
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
        figures={f"further_{name}": count for name, count in spare.figures.items()},
    )
