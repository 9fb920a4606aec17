"""The verdict of the reasoning-gym task that made a question; for questions of dataset ``reasoning_gym``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field

from dteframe import Completion, Component, Context, DataError, Question, Reward, RewardConfig, hookimpl
from dteframe.answer_pattern import AnswerPattern, last_answer
from dteframe.gym_entries import from_json, make_task, to_json

if TYPE_CHECKING:
    from reasoning_gym.factory import ProceduralDataset

REQUIRED_COLUMNS = ("task", "options", "entry")


class ReasoningGymRewardConfig(RewardConfig):
    """Options of ``reasoning_gym``."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    answer_pattern: AnswerPattern | None = None
    """Regular expression; group 1 of its last match, at the ends without whitespace, is the answer:
    ``<answer>(.*?)</answer>``; a dot does match a line's end. null: the whole completion."""
    threshold: float | None = Field(default=0.99, gt=0, le=1)
    """Scores from here on count as 1 and others as 0: several tasks give part of the credit for a long answer
    that holds the right one. null: the task's own scores."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Take the whole completion."""
        return cls()

    @classmethod
    def example_questions(cls) -> Sequence[Question]:
        """Give sums of the task ``chain_sum``: other questions lack what its score needs."""
        return [
            Question(
                id=f"chain_sum-{number}",
                text=entry["question"],
                prompt=entry["question"],
                answer=entry["answer"],
                columns={"task": "chain_sum", "options": to_json({}), "entry": to_json(entry)},
            )
            for number, entry in enumerate(make_task("chain_sum", {}, seed=0, size=24))
        ]


@final
class ReasoningGymReward(Reward):
    """The reasoning-gym task's own score of the answer, as right (1) or wrong (0)."""

    config: ReasoningGymRewardConfig

    def __init__(self, config: ReasoningGymRewardConfig, context: Context) -> None:
        """Start without tasks; each is built when its first question is scored."""
        super().__init__(config, context)
        pattern = self.config.answer_pattern
        self._pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        self._tasks: dict[str, ProceduralDataset] = {}

    def start(self) -> None:
        """Import the package."""
        import reasoning_gym  # noqa: F401  # it takes seconds

    def score(self, question: Question, completions: Sequence[Completion]) -> list[float | None]:
        """Let the task score each answer; one that the task fails on is wrong, and warned of.

        None where the pattern finds no answer.

        Raises:
            ValueError: the question is not from the dataset ``reasoning_gym``.
        """
        problem = self.problem_with(question)
        if problem is not None:
            raise ValueError(f"question {question.id!r}: {problem}")
        task = self._task_of(question)
        # Tasks may change the entry that they are given, so each completion has its own.
        return [self._score(task, question, completion.text) for completion in completions]

    def problem_with(self, question: Question) -> str | None:
        """Refuse questions that no task can score."""
        missing = [column for column in REQUIRED_COLUMNS if column not in question.columns]
        if missing:
            return f"it lacks the columns {', '.join(missing)} that dataset type 'reasoning_gym' gives"
        try:
            self._task_of(question)
        except DataError as error:
            return str(error)
        return None

    def _task_of(self, question: Question) -> ProceduralDataset:
        name, options = str(question.columns["task"]), from_json(question.columns["options"])
        key = f"{name} {json.dumps(options, sort_keys=True)}"
        if key not in self._tasks:
            self._tasks[key] = make_task(name, options, seed=0, size=1)
        return self._tasks[key]

    def _score(self, task: ProceduralDataset, question: Question, text: str) -> float | None:
        answer = self._answer_of(text)
        if answer is None:
            return None
        try:
            score = float(task.score_answer(answer, from_json(question.columns["entry"])))
        except Exception as error:  # noqa: BLE001  # tasks raise anything on garbage, such as SyntaxError
            self.context.warn(
                f"reasoning_gym task {question.columns['task']!r} fails on some answers, with "
                f"{type(error).__name__}; they count as wrong"
            )
            return 0.0
        if not math.isfinite(score):
            return 0.0
        return score if self.config.threshold is None else float(score >= self.config.threshold)

    def _answer_of(self, text: str) -> str | None:
        if self._pattern is None:
            return text.strip()
        answer = last_answer(self._pattern, text)
        return None if answer is None else answer.strip()


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [ReasoningGymReward]
