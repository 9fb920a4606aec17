"""The errors that people read: each message is ``where: what is wrong, with the value; what to do``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DTEFrameError(Exception):
    """An error of the user's input or surroundings; the command line prints it without a traceback."""

    exit_code = 1


class RecipeError(DTEFrameError):
    """A recipe that cannot be run; carries every problem found in it."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Hold ``problems``, at least one, in the order in which they stand in the file."""
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PluginError(DTEFrameError):
    """A plugin that cannot be loaded, clashes with another, or breaks a promise of its kind."""

    exit_code = 2


class DataError(DTEFrameError):
    """Data that cannot be read or used: a missing file, a missing column, an empty split."""


class SamplerError(DTEFrameError):
    """What samples outside the trainer cannot be started or reached, refuses the policy, or has died."""


class SilentError(DTEFrameError):
    """An error that follows from another one, which is told elsewhere: nothing is to be said."""


class ResumeError(DTEFrameError):
    """A run folder that cannot be continued with this recipe."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe."""

    where: str
    """``file:line:col``, or ``--set`` for an override from the command line."""
    key: str
    """Dotted path of the recipe key, or empty where no key is concerned."""
    what: str
    """What is wrong, with the value, and what to do."""

    def __str__(self) -> str:
        """Join the parts to the line that a person reads."""
        return ": ".join(part for part in (self.where, self.key, self.what) if part)
