"""Questions that reasoning-gym's tasks generate, several tasks mixed."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, final

from pydantic import BaseModel, Field, model_validator

from dteframe import Component, DataError, Dataset, PluginConfig, Question, Questions, hookimpl
from dteframe.datasets.columns import PromptConfig
from dteframe.datasets.mixture import divided
from dteframe.gym_entries import make_task, to_json
from dteframe.gym_short import SHORT_FORMS

FEWEST_REPEATS = 1000
"""Questions in a row that all repeat others before a task is given up."""
MOST_TRIES = 20
"""Entries generated per question wanted, at most: a task that repeats itself more has too few questions."""
REPORT_EVERY = 500
"""Questions between two reports of progress."""


class TaskConfig(BaseModel):
    """One task of the mixture."""

    model_config = PluginConfig.model_config

    name: str = Field(min_length=1)
    """reasoning-gym's name of the task: ``chain_sum``, ``letter_counting``, ..."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the questions, in any unit."""
    options: dict[str, Any] = {}
    """The task's own options, under reasoning-gym's names; ``seed`` and ``size`` are the dataset's."""
    short: bool = False
    """Ask in a few characters in place of the task's own words (``6+7-9=``), for models made from scratch:
    ``base_conversion``, ``chain_sum``, ``letter_counting`` and ``spell_backward``."""
    solutions: bool = False
    """Give worked solutions to warm up on, which end in a colon and the answer (``13 4:4``); needs
    ``short``."""
    asks_work: bool = False
    """Take the whole worked solution for the answer, so that a lucky last number is none; needs ``short``,
    and a reward that compares with the answer (the reward ``reasoning_gym`` has the task judge)."""

    @model_validator(mode="after")
    def _has_a_short_form(self) -> Self:
        for option in ("solutions", "asks_work"):
            if getattr(self, option) and not self.short:
                raise ValueError(f"{option}: only short questions have worked solutions; set short too")
        if self.short and self.name not in SHORT_FORMS:
            known = ", ".join(SHORT_FORMS)
            raise ValueError(f"short: {self.name!r} has no short form; those that have one: {known}")
        return self


class ReasoningGymConfig(PromptConfig):
    """Options of ``reasoning_gym``."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[TaskConfig] = Field(min_length=1)
    """The tasks that are mixed; one may occur twice with different options."""
    size: int = Field(default=1000, ge=1)
    """Distinct questions, held-out ones included."""
    seed: int = Field(default=0, ge=0)
    """Of the questions; another seed gives other questions, whatever the recipe's seed."""

    def num_questions_by_task(self) -> list[int]:
        """Divide ``size`` over the tasks by weight."""
        return divided(self.size, [task.weight for task in self.tasks])

    def num_questions(self) -> int:
        """Give ``size``."""
        return self.size

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Twenty sums."""
        return cls(tasks=[TaskConfig(name="chain_sum", options={"max_terms": 3, "max_digits": 1})], size=20)


@final
class ReasoningGym(Dataset):
    """Questions that reasoning-gym's tasks generate, several tasks mixed, without duplicates."""

    config: ReasoningGymConfig

    def load(self) -> Questions:
        """Generate the questions: the same for the same configuration, the tasks interleaved."""
        seen: set[str] = set()
        left_out: Counter[str] = Counter()
        by_task = [
            self._questions_of(number, task, count, seen, left_out)
            for number, (task, count) in enumerate(
                zip(self.config.tasks, self.config.num_questions_by_task(), strict=True)
            )
        ]
        # By the share of its own task that is done: every part of the list holds the whole mixture.
        places = [
            ((place + 0.5) / len(questions), number, question)
            for number, questions in enumerate(by_task)
            for place, question in enumerate(questions)
        ]
        train = tuple(question for _, _, question in sorted(places, key=lambda item: item[:2]))
        return Questions(train, left_out=dict(left_out))

    def _questions_of(
        self, number: int, task: TaskConfig, count: int, seen: set[str], left_out: Counter[str]
    ) -> list[Question]:
        most = MOST_TRIES * count + 100
        # Tasks add the entry's number to the seed: neighbouring seeds would share nearly all their entries.
        digest = hashlib.sha256(f"{self.config.seed} {number} {task.name}".encode()).digest()
        seed = int.from_bytes(digest[:4]) >> 1
        where = f"reasoning_gym task {task.name!r}"
        questions: list[Question] = []
        num_tries = 0
        with _own_chance(f"{seed}"):
            generator = make_task(task.name, task.options, seed, most)
        num_repeats = 0  # In a row: where they are many, the task has hardly anything new to ask.
        while (
            len(questions) < count and num_tries < most and num_repeats < FEWEST_REPEATS + 5 * len(questions)
        ):
            try:
                with _own_chance(f"{seed} {num_tries}"):
                    entry = generator[num_tries]
            except IndexError:  # A task with a fixed number of entries has no more.
                break
            question = self._question(f"{number}-{task.name}-{num_tries}", task, entry)
            num_tries += 1
            if not question.text:
                left_out[f"{where}: its question is empty"] += 1
            elif question.text_hash in seen:
                left_out[f"{where}: its question repeats another"] += 1
                num_repeats += 1
            else:
                seen.add(question.text_hash)
                questions.append(question)
                num_repeats = 0
                if len(questions) % REPORT_EVERY == 0:
                    self.context.progress(f"generating {task.name}", len(questions), count)
        if len(questions) < count:
            raise DataError(
                f"{where}: gave {len(questions)} distinct questions in {num_tries} tries, not {count}; "
                "lower size or weight, or widen the task's options"
            )
        return questions

    def _question(self, question_id: str, task: TaskConfig, entry: dict[str, Any]) -> Question:
        text, solution = str(entry["question"]).strip(), None
        # Tasks without a single right answer have none here; their score asks for the entry alone.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        if task.short:
            text, solution = SHORT_FORMS[task.name](entry)
            answer = solution if task.asks_work else answer
        return Question(
            id=question_id,
            text=text,
            prompt=self.config.prompt(text),
            answer=answer,
            solution=solution if task.solutions else None,
            columns={"task": task.name, "options": to_json(task.options), "entry": to_json(entry)},
        )


@contextmanager
def _own_chance(seed: str) -> Iterator[None]:
    """Lend Python's global generator, which some tasks (codeio) draw from, a seed for a while."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [ReasoningGym]
