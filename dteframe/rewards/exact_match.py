"""1 for a completion whose answer is the gold answer, letter by letter; 0 for any other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, final

from dteframe import Completion, Component, Context, Question, Reward, RewardConfig, hookimpl
from dteframe.answer_pattern import AnswerPattern, last_answer


class ExactMatchConfig(RewardConfig):
    """Options of ``exact_match``."""

    type: Literal["exact_match"] = "exact_match"
    answer_pattern: AnswerPattern | None = None
    r"""Regular expression; group 1 of its last match is the answer: ``:(\d+)$``. null: the whole text is."""
    ignore_case: bool = False
    """Whether ``Paris`` equals ``paris``."""
    ignore_whitespace: Literal["none", "ends", "all"] = "ends"
    """Which whitespace does not count: none, that at both ends, or all of it (``1 000`` equals ``1000``)."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Take the last number of a completion."""
        return cls(answer_pattern=r"(-?\d+)")


@final
class ExactMatch(Reward):
    """1 if the completion's answer equals the gold answer, else 0; the answer by a regular expression."""

    config: ExactMatchConfig

    def __init__(self, config: ExactMatchConfig, context: Context) -> None:
        """Compile the pattern once."""
        super().__init__(config, context)
        pattern = self.config.answer_pattern
        self._pattern = None if pattern is None else re.compile(pattern)

    def score(self, question: Question, completions: Sequence[Completion]) -> list[float | None]:
        """Compare each completion's answer with the gold answer; None where the pattern finds no answer."""
        gold = self._normalised(question.answer)
        answers = [self._answer_of(completion.text) for completion in completions]
        return [None if answer is None else float(answer == gold) for answer in answers]

    def problem_with(self, question: Question) -> str | None:
        """Refuse an empty gold answer: every completion without an answer would be right."""
        if not self._normalised(question.answer):
            return f"its answer {question.answer!r} is empty"
        return None

    def _answer_of(self, text: str) -> str | None:
        if self._pattern is None:
            return self._normalised(text)
        answer = last_answer(self._pattern, text)
        return None if answer is None else self._normalised(answer)

    def _normalised(self, text: str) -> str:
        match self.config.ignore_whitespace:
            case "ends":
                text = text.strip()
            case "all":
                text = "".join(text.split())
            case "none":
                pass
        return text.casefold() if self.config.ignore_case else text


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [ExactMatch]
