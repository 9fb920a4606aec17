"""Check the promises of a plugin's kind: ours in the tests, anybody's with ``dteframe check FILE``."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dteframe.contracts import KINDS, RewardConfig
from dteframe.records import Question
from dteframe.registry import Registered
from dteframe.testing.promises import (
    dataset,
    estimator,
    every_kind,
    model,
    objective,
    replay,
    reward,
    rollout,
    selector,
    tracker,
)
from dteframe.testing.subject import BrokenPromise, Promise, Subject

_PROMISES: Mapping[str, tuple[Promise, ...]] = {
    "model": model.PROMISES,
    "dataset": dataset.PROMISES,
    "reward": reward.PROMISES,
    "estimator": estimator.PROMISES,
    "selector": selector.PROMISES,
    "replay": replay.PROMISES,
    "rollout": rollout.PROMISES,
    "objective": objective.PROMISES,
    "tracker": tracker.PROMISES,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A promise that a plugin breaks."""

    promise: str
    """Its name, which says what is promised."""
    what: str
    """What the plugin did instead."""
    advice: str
    """The promise's docstring: what the plugin's author has to do."""


def promises(kind: str) -> list[Promise]:
    """List the promises of a kind: those of every plugin first."""
    return [*every_kind.PROMISES, *_PROMISES[kind]]


def check_component(
    registered: Registered, folder: Path, questions: Sequence[Question] | None = None
) -> list[Failure]:
    """Check all promises of a plugin's kind; each starts with an empty folder of its own.

    Args:
        registered: the plugin, as the registry has it.
        folder: an empty folder for files; a cache in it is shared by the promises.
        questions: what to ask the plugin about instead of small sums, at least 24: for a reward that can
            score only some questions, say.

    Returns:
        The broken promises in the order of ``promises``; empty if all are kept.
    """
    if questions is None and issubclass(registered.config, RewardConfig):
        questions = registered.config.example_questions()
    subject = Subject(registered, folder, tuple(questions)) if questions else Subject(registered, folder)
    failures = []
    for promise in promises(registered.kind):
        shutil.rmtree(folder / "run", ignore_errors=True)
        what = _how_broken(promise, subject)
        if what is not None:
            failures.append(Failure(promise.__name__, what, inspect.getdoc(promise) or ""))
    return failures


def _how_broken(promise: Promise, subject: Subject) -> str | None:
    try:
        promise(subject)
    except BrokenPromise as broken:
        return str(broken)
    except Exception as error:  # noqa: BLE001  # a plugin may raise anything, and each is a broken promise
        return f"raised {type(error).__name__}: {error}"
    return None


assert _PROMISES.keys() == KINDS.keys(), "every kind has promises"
