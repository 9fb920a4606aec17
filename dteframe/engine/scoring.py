"""Score the completions of a question by all rewards; where that fails, find the completions at fault.

Imports no torch: worker processes run it too.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Reward
from dteframe.engine import calls
from dteframe.errors import DTEFrameError
from dteframe.records import Completion, Question, RewardStatus

MAX_ERROR_CHARACTERS = 500
"""Of what a reward's error says: some repeat the whole completion."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one attempt to score some completions of a question."""

    parts: Mapping[str, Sequence[float | None]] | None
    """Scores by reward, None where it found no answer; None if the attempt failed."""
    warnings: tuple[str, ...] = ()
    failure: Literal["timeout", "error"] = "error"
    """How it failed; not read where ``parts`` are there."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a group, and what became of each completion."""

    parts: Mapping[str, Float[np.ndarray, "group"]]
    """By reward, unweighted; 0 where no answer was found, and from every reward where one failed."""
    statuses: tuple[RewardStatus, ...]
    errors: tuple[str, ...]
    """What failed, per completion; empty where nothing did."""
    warnings: tuple[str, ...]


Attempt: TypeAlias = Callable[[Question, Sequence[Completion]], Reply]
"""Scores some completions of a question; never raises for what a reward does."""


def named_rewards(rewards: Sequence[Reward]) -> Mapping[str, Reward]:
    """Name each reward by its type, and by its place too where a type stands twice."""
    types = [reward.config.type for reward in rewards]
    names = [name if types.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(types)]
    return dict(zip(names, rewards, strict=True))


def attempt_with(rewards: Mapping[str, Reward], warnings: list[str]) -> Attempt:
    """Give the attempt that asks these rewards, in this process.

    Args:
        rewards: by name.
        warnings: where their contexts put what they warn of; emptied into every reply.
    """

    def attempt(question: Question, completions: Sequence[Completion]) -> Reply:
        error, parts = "", {}
        try:
            for name, reward in rewards.items():
                parts[name] = calls.score(reward, question, completions)
        except Exception as raised:  # noqa: BLE001  # a reward may raise anything
            error = _said(raised)
        told = tuple(warnings)
        warnings.clear()
        return Reply(None, told, error=error) if error else Reply(parts, told)

    return attempt


def score_group(
    attempt: Attempt, names: Sequence[str], question: Question, completions: Sequence[Completion]
) -> Scores:
    """Score all completions together; where that fails each alone, so that only those at fault fail.

    Args:
        attempt: scores some of them.
        names: of the rewards.
        question: what was asked.
        completions: of the question, at least one.
    """
    together = attempt(question, completions)
    if together.parts is not None or len(completions) == 1:
        return _joined(names, [(together, len(completions))])
    alone = [(attempt(question, [completion]), 1) for completion in completions]
    scores = _joined(names, alone)
    if any(scores.errors):
        return scores
    warning = (
        f"reward: the completions of question {question.id!r} could not be scored together, but each alone: "
        f"{together.error}"
    )
    return Scores(scores.parts, scores.statuses, scores.errors, (*scores.warnings, warning))


def _joined(names: Sequence[str], replies: Sequence[tuple[Reply, int]]) -> Scores:
    """Put together what came of attempts at so many completions each."""
    parts: dict[str, list[float]] = {name: [] for name in names}
    statuses: list[RewardStatus] = []
    errors: list[str] = []
    for reply, num_completions in replies:
        for place in range(num_completions):
            found = None if reply.parts is None else [reply.parts[name][place] for name in names]
            for name, score in zip(names, found or [None] * len(names), strict=True):
                parts[name].append(0.0 if score is None else score)
            if found is None:
                statuses.append(reply.failure)
            else:
                statuses.append("unparseable" if None in found else "scored")
            errors.append(reply.error)
    return Scores(
        parts={name: np.array(scores) for name, scores in parts.items()},
        statuses=tuple(statuses),
        errors=tuple(errors),
        warnings=tuple(warning for reply, _ in replies for warning in reply.warnings),
    )


def _said(error: Exception) -> str:
    """Word what a reward raised: which reward, what, and on which line of its file."""
    if isinstance(error, DTEFrameError):
        return str(error)[:MAX_ERROR_CHARACTERS]
    notes = getattr(error, "__notes__", [])
    where = next((note.removeprefix("while running ") for note in notes), "reward")
    file = where.rpartition(": ")[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file and _is(frame, file)]
    line = f" (line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    message = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS]
    return f"{where} raised {type(error).__name__}: {message}{line}"


def _is(frame: traceback.FrameSummary, file: str) -> bool:
    return Path(frame.filename) == Path(file).absolute()
