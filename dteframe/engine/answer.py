"""Ask questions: generate completions, score them, count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from dteframe.assemble import Parts
from dteframe.contracts import Reward
from dteframe.engine import calls
from dteframe.engine.member import Member, Work
from dteframe.engine.out_of_memory import memory_for, sampling_remedies
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
    setup: Setup, question_ids: Sequence[str], purpose: Purpose, step: int, rng: np.random.Generator
) -> tuple[Group, ...]:
    """Roll out questions with the present policy: one group each, in the order of ``question_ids``.

    The policy of step t has t - 1 steps behind it; the evaluation at step t comes after the step's update.
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
    tell(setup, step, groups, is_replayed=False)
    return groups


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
        with member.meter.stage(generating):
            with (
                memory_for(generating, work, member.context.device, remedies),
                member.learner.whole_module() if rollout.shares_module else nullcontext(),
            ):
                answers = calls.generate(rollout, prompts, self.num_generations, self.sampling, seeds)
            processes.wait()
        with member.meter.stage(scoring):
            rewards = named_rewards(member.parts)
            groups = {
                place: self._scored(member, rewards, place, completions)
                for place, completions in zip(share, answers, strict=True)
            }
            every = processes.collect(groups)
        member.tell_warnings()
        found = {place: group for groups in every for place, group in groups.items()}
        return tuple(found[place] for place in sorted(found))

    def _shares(self, num_processes: int) -> list[list[int]]:
        """Deal the places of the prompts, by length: all processes get like many of like lengths."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        return [sorted(order[first::num_processes]) for first in range(num_processes)]

    def _scored(
        self, member: Member, rewards: Mapping[str, Reward], place: int, completions: Sequence[Completion]
    ) -> Group:
        """Make a group of a question's completions: rewards, and which of them are successes."""
        question, prompt = self.questions[place], self.prompts[place]
        parts = {name: calls.score(reward, question, completions) for name, reward in rewards.items()}
        total = sum(reward.config.weight * parts[name] for name, reward in rewards.items())
        verdicts = next(iter(parts.values())) >= member.recipe.training.success_threshold
        return Group(
            question_id=question.id,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(completions),
            rewards=np.asarray(total, dtype=np.float64),
            successes=int(verdicts.sum()),
            policy_version=self.policy_version,
            purpose=self.purpose,
            reward_parts=parts,
        )


def observation_of(groups: Sequence[Group], purpose: Purpose) -> Observation:
    """Sum up what was measured, for the estimator; ``groups`` is not empty."""
    return Observation(
        question_ids=tuple(group.question_id for group in groups),
        successes=np.array([group.successes for group in groups], dtype=np.int64),
        trials=np.array([group.trials for group in groups], dtype=np.int64),
        policy_version=groups[0].policy_version,
        purpose=purpose,
    )


def tell(setup: Setup, step: int, groups: Sequence[Group], *, is_replayed: bool) -> None:
    """Show groups to those who watch."""
    questions = {group.question_id: _question(setup, group.question_id) for group in groups}
    report = GroupsReport(
        step=step,
        groups=tuple(groups),
        prompts={name: _prompt_text(question) for name, question in questions.items()},
        answers={name: question.answer for name, question in questions.items()},
        is_replayed=is_replayed,
        texts={name: question.text for name, question in questions.items()},
    )
    setup.hooks.hook.dteframe_groups_scored(groups=report)


def named_rewards(parts: Parts) -> Mapping[str, Reward]:
    """Name each reward by its type, and by its place too where a type stands twice."""
    types = [reward.config.type for reward in parts.rewards]
    names = [name if types.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(types)]
    return dict(zip(names, parts.rewards, strict=True))


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
