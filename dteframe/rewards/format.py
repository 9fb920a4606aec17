"""1 for a completion of the right form, whatever it says; 0 for any other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, final

from pydantic import Field, field_validator

from dteframe import Completion, Component, Context, Question, Reward, RewardConfig, hookimpl


class FormatConfig(RewardConfig):
    """Options of ``format``."""

    type: Literal["format"] = "format"
    pattern: str = Field(min_length=1)
    r"""Regular expression, in which a dot matches a line's end too: ``<think>.*</think>.*\\boxed``."""
    full_match: bool = False
    """Whether the whole completion must match (true) or some part of it (false)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Ask for a digit."""
        return cls(pattern=r"\d")


@final
class Format(Reward):
    """1 if the completion matches a regular expression, else 0; usually second in the list of rewards."""

    config: FormatConfig

    def __init__(self, config: FormatConfig, context: Context) -> None:
        """Compile the pattern once."""
        super().__init__(config, context)
        pattern = re.compile(self.config.pattern, re.DOTALL)
        self._match = pattern.fullmatch if self.config.full_match else pattern.search

    def score(self, question: Question, completions: Sequence[Completion]) -> list[float]:
        """Match each completion; the question does not matter."""
        return [float(self._match(completion.text) is not None) for completion in completions]


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [Format]
