"""Ask questions: generate completions, score them, count them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from dteframe.engine import calls
from dteframe.engine.failure_watch import FailureWatch
from dteframe.engine.member import Member, Work
from dteframe.engine.non_finite import NonFiniteError, keep_groups
from dteframe.engine.out_of_memory import memory_for, sampling_remedies
from dteframe.engine.reward_failures import heed_failures, without_failures
from dteframe.engine.reward_pool import PendingScores
from dteframe.engine.setup import Setup
from dteframe.records import Completion, Group, Observation, Prompt, Purpose, Question, Sampling
from dteframe.reports import GroupsReport

STAGES: Mapping[Purpose, tuple[str, str]] = {
    "train": ("generate", "score"),
    "reference": ("references", "references"),
    "evaluation": ("evaluate", "evaluate"),
}
"""Where the seconds of generating and of scoring go, by purpose."""


def answer(
    setup: Setup,
    question_ids: Sequence[str],
    purpose: Purpose,
    step: int,
    rng: np.random.Generator,
    review: Callable[[Sequence[Group]], Mapping[str, str]] | None = None,
) -> tuple[Group, ...]:
    """Roll out questions with the present policy: one group each, in the order of ``question_ids``.

    The policy of step t has t - 1 steps behind it; the evaluation at step t comes after the step's update.
    ``review`` says which groups nobody will train on, and why, before they are shown.
    """
    sampling, num_generations = _how(setup, purpose)
    asked = Ask(
        questions=tuple(_question(setup, question_id) for question_id in question_ids),
        prompts=tuple(setup.prompts[question_id] for question_id in question_ids),
        seeds=tuple(int(seed) for seed in rng.integers(2**63, size=len(question_ids))),
        num_generations=num_generations,
        sampling=sampling,
        purpose=purpose,
        policy_version=step if purpose == "evaluation" else step - 1,
    )
    groups = setup.together(asked)
    setup.meter.charge(groups)
    kept = _with_finite_logprobs(setup, step, groups)
    if setup.recipe.training.on_reward_failure != "zero":
        kept = without_failures(kept)
    unused = review(kept) if review and kept else {}
    tell(setup, step, groups, is_replayed=False, unused=unused)
    heed_failures(setup, step, groups)
    return kept


@dataclass(frozen=True, slots=True)
class Ask(Work[tuple[Group, ...]]):
    """Questions to answer and to score."""

    questions: tuple[Question, ...]
    prompts: tuple[Prompt, ...]
    """Of the questions, in the same order."""
    seeds: tuple[int, ...]
    """Of the prompts: their completions are the same, whichever process samples them."""
    num_generations: int
    sampling: Sampling
    purpose: Purpose
    policy_version: int

    def do(self, member: Member) -> tuple[Group, ...]:
        """Answer and score this process's share; the main one gets all groups, in the questions' order."""
        processes = member.processes
        generating, scoring = STAGES[self.purpose]
        share = self._shares(processes.count)[processes.rank]
        prompts, seeds = [self.prompts[place] for place in share], [self.seeds[place] for place in share]
        rollout = member.parts.rollout
        work = f"{len(share)} prompts x {self.num_generations} completions"
        remedies = sampling_remedies(member.recipe.rollout)
        watch = FailureWatch(member.recipe.training, len(self.questions) * self.num_generations)
        answered: dict[int, tuple[Sequence[Completion], PendingScores]] = {}
        with member.meter.stage(generating):
            with (
                memory_for(generating, work, member.context.device, remedies),
                member.learner.whole_module() if rollout.shares_module else nullcontext(),
            ):
                for index, completions in calls.generate(
                    rollout, prompts, self.num_generations, self.sampling, seeds
                ):
                    scores = member.scorer.submit(self.questions[share[index]], completions, watch)
                    answered[share[index]] = completions, scores
            processes.wait()
        with member.meter.stage(scoring):
            groups = {place: self._group(member, place, *answered[place]) for place in share}
            every = processes.collect(groups)
        member.tell_warnings()
        found = {place: group for groups in every for place, group in groups.items()}
        return tuple(found[place] for place in sorted(found))

    def _shares(self, num_processes: int) -> list[list[int]]:
        """Deal the places of the prompts, by length: all processes get like many of like lengths."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        return [sorted(order[first::num_processes]) for first in range(num_processes)]

    def _group(
        self, member: Member, place: int, completions: Sequence[Completion], pending: PendingScores
    ) -> Group:
        """Make a group of a question's completions: rewards, and which of them are successes."""
        question, prompt, scores = self.questions[place], self.prompts[place], pending()
        for warning in scores.warnings:
            member.context.warn(warning)
        weights = [reward.config.weight for reward in member.parts.rewards]
        total = sum(weight * part for weight, part in zip(weights, scores.parts.values(), strict=True))
        is_scored = np.array([status == "scored" for status in scores.statuses])
        verdicts = next(iter(scores.parts.values())) >= member.recipe.training.success_threshold
        return Group(
            question_id=question.id,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(completions),
            rewards=np.asarray(total, dtype=np.float64),
            successes=int((verdicts & is_scored).sum()),
            policy_version=self.policy_version,
            purpose=self.purpose,
            reward_parts=scores.parts,
            reward_statuses=() if is_scored.all() else scores.statuses,
            reward_errors=scores.errors if any(scores.errors) else (),
        )


def _with_finite_logprobs(setup: Setup, step: int, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Leave groups out whose sampler gave a log-prob that is not finite, where the recipe wants that.

    Raises:
        NonFiniteError: it does not, or no group is left.
    """
    broken = [group for group in groups if not group.has_finite_logprobs]
    if not broken:
        return groups
    setup.meter.note_non_finite(len(broken))
    what = (
        f"step {step}: the sampler gave log-probs that are not finite in {len(broken)} of {len(groups)} "
        f"groups asked for {broken[0].purpose}, the first for question {broken[0].question_id!r}"
    )
    where = keep_groups(setup.context.run_folder, step, broken)
    if setup.recipe.training.on_non_finite == "stop" or len(broken) == len(groups):
        raise NonFiniteError(
            f"{what}; lower training.learning_rate, or let the sampler compute in float32{where}"
        )
    setup.context.warn(f"{what}; these are left out (training.on_non_finite){where}")
    return tuple(group for group in groups if group.has_finite_logprobs)


def observation_of(groups: Sequence[Group], purpose: Purpose) -> Observation:
    """Sum up what was measured, for the estimator; ``groups`` is not empty."""
    return Observation(
        question_ids=tuple(group.question_id for group in groups),
        successes=np.array([group.successes for group in groups], dtype=np.int64),
        trials=np.array([group.trials for group in groups], dtype=np.int64),
        policy_version=groups[0].policy_version,
        purpose=purpose,
    )


def tell(
    setup: Setup,
    step: int,
    groups: Sequence[Group],
    *,
    is_replayed: bool,
    unused: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Show groups to those who watch."""
    questions = {group.question_id: _question(setup, group.question_id) for group in groups}
    report = GroupsReport(
        step=step,
        groups=tuple(groups),
        prompts={name: _prompt_text(question) for name, question in questions.items()},
        answers={name: question.answer for name, question in questions.items()},
        is_replayed=is_replayed,
        texts={name: question.text for name, question in questions.items()},
        unused=unused,
    )
    setup.hooks.hook.dteframe_groups_scored(groups=report)


def _how(setup: Setup, purpose: Purpose) -> tuple[Sampling, int]:
    training = setup.recipe.training
    if purpose != "evaluation":
        return setup.sampling, training.num_generations
    temperature = training.evaluation_temperature or setup.sampling.temperature
    return replace(setup.sampling, temperature=temperature), training.num_generations_eval


def _question(setup: Setup, question_id: str) -> Question:
    return setup.pool.train.get(question_id) or setup.pool.evaluation[question_id]


def _prompt_text(question: Question) -> str:
    if isinstance(question.prompt, str):
        return question.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in question.prompt)
