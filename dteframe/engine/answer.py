"""Ask questions: generate completions, score them, count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dteframe.contracts import Reward
from dteframe.engine import calls
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
    generating, scoring = STAGES[purpose]
    prompts = [setup.prompts[question_id] for question_id in question_ids]
    with setup.meter.stage(generating):
        seeds = [int(seed) for seed in rng.integers(2**63, size=len(prompts))]
        answers = calls.generate(setup.parts.rollout, prompts, num_generations, sampling, seeds)
    version = step if purpose == "evaluation" else step - 1
    with setup.meter.stage(scoring):
        rewards = named_rewards(setup)
        groups = tuple(
            _scored(setup, rewards, prompt, completions, purpose, version)
            for prompt, completions in zip(prompts, answers, strict=True)
        )
    setup.meter.charge(groups)
    tell(setup, step, groups, is_replayed=False)
    return groups


def _scored(
    setup: Setup,
    rewards: Mapping[str, Reward],
    prompt: Prompt,
    completions: Sequence[Completion],
    purpose: Purpose,
    policy_version: int,
) -> Group:
    """Make a group of a question's completions: rewards, and which of them are successes."""
    question = _question(setup, prompt.question_id)
    parts = {name: calls.score(reward, question, completions) for name, reward in rewards.items()}
    total = sum(reward.config.weight * parts[name] for name, reward in rewards.items())
    verdicts = next(iter(parts.values())) >= setup.recipe.training.success_threshold
    return Group(
        question_id=question.id,
        prompt_token_ids=prompt.token_ids,
        completions=tuple(completions),
        rewards=np.asarray(total, dtype=np.float64),
        successes=int(verdicts.sum()),
        policy_version=policy_version,
        purpose=purpose,
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


def named_rewards(setup: Setup) -> Mapping[str, Reward]:
    """Name each reward by its type, and by its place too where a type stands twice."""
    types = [reward.config.type for reward in setup.parts.rewards]
    names = [name if types.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(types)]
    return dict(zip(names, setup.parts.rewards, strict=True))


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
