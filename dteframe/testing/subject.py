"""The plugin whose promises are being checked, and how a promise is reported broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Component, Context, PluginConfig
from dteframe.records import Completion, Group, Purpose, Question
from dteframe.registry import Registered
from dteframe.testing.tiny import tiny_questions


class BrokenPromise(AssertionError):
    """A plugin does not do what its kind promises; the message says what it did instead."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One plugin under examination: it is made anew as often as a promise wants."""

    registered: Registered
    folder: Path
    """For the files of the example configuration, the cache and the run; exists."""
    questions: tuple[Question, ...] = field(default_factory=lambda: tiny_questions(24))
    """What the plugin is asked about."""

    def config(self) -> Any:
        """Give the example configuration that the plugin itself proposes."""
        return self.registered.config.example(self.folder)

    def make(self, config: PluginConfig | None = None) -> Any:
        """Build the component, from its example configuration unless another is given."""
        return self.registered.component(config or self.config(), self.context())

    def context(self) -> Context:
        """Give surroundings on the CPU, in which nobody listens."""
        cache, run = self.folder / "cache", self.folder / "run"
        cache.mkdir(exist_ok=True)
        run.mkdir(exist_ok=True)
        return Context(cache, run, "cpu", 0, progress=_ignore_progress, warn=_ignore_warning)


Promise: TypeAlias = Callable[[Subject], None]
"""Its name says what is promised, its docstring what the plugin's author has to do; raises when broken."""


def insist(kept: object, otherwise: str) -> None:
    """Raise BrokenPromise with the sentence ``otherwise`` unless the promise is kept."""
    if not kept:
        raise BrokenPromise(otherwise)


def insist_on_storable_state(component: Component) -> None:
    """Raise BrokenPromise if the state holds anything but JSON values and numpy arrays."""
    wrong = [
        f"{path} is a {type(value).__name__}" for path, value in _unstorable(component.state_dict(), "state")
    ]
    insist(not wrong, f"{'; '.join(wrong[:3])}; a checkpoint keeps only JSON values and numpy arrays")


def copy_of_state(component: Component) -> Mapping[str, Any]:
    """Copy the state, so that what the component does next cannot reach it."""
    copied: Mapping[str, Any] = _copied(component.state_dict())
    return copied


def same_value(one: Any, other: Any) -> bool:
    """Compare states, groups and other nested values bit for bit, arrays with their type."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        both = isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
        return both and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other)


def letters_of(
    texts: Sequence[str], *, layer: int | None = None, suffix: str | None = None
) -> Float[np.ndarray, "texts width"]:
    """Stand in for the policy's view of a text: how often each printable character occurs in it.

    The options of a real encoder are taken and change nothing.
    """
    counts = np.zeros((len(texts), 96))
    for row, text in enumerate(texts):
        for character in text:
            counts[row, ord(character) % 96] += 1.0
    shares: Float[np.ndarray, "texts width"] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    return shares


def group_of(
    question_id: str, successes: int, trials: int = 4, policy_version: int = 0, purpose: Purpose = "train"
) -> Group:
    """Make a scored group whose first ``successes`` completions earn 1 and the others 0."""
    completions = tuple(completion_of(f"{question_id}:{index}") for index in range(trials))
    rewards = (np.arange(trials) < successes).astype(np.float64)
    prompt = np.arange(3, dtype=np.int64)
    parts = {"accuracy": rewards.copy()}
    return Group(question_id, prompt, completions, rewards, successes, policy_version, purpose, parts)


def completion_of(text: str) -> Completion:
    """Make a completion of this text, one token per character and an end, each a little less likely."""
    token_ids = np.array([*(ord(character) for character in text), 1], dtype=np.int64)
    logprobs = -0.1 * np.arange(1, len(token_ids) + 1, dtype=np.float32)
    return Completion(token_ids, logprobs, "stop", text)


def in_order(answers: Iterable[tuple[int, Sequence[Completion]]]) -> list[Sequence[Completion]]:
    """Put what a rollout gives into the order of its prompts."""
    by_place = dict(answers)
    return [by_place[place] for place in sorted(by_place)]


def copy_of_group(group: Group) -> Group:
    """Copy a group with all of its arrays."""
    return Group.from_state(_copied(group.to_state()))


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner) for inner in value]
    return value


def _unstorable(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"the key {key!r} of {path}", key
            yield from _unstorable(inner, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unstorable(inner, f"{path}[{index}]")
    elif isinstance(value, np.ndarray):
        if value.dtype == np.object_:
            yield f"{path}, an array of objects,", value
    elif not (value is None or type(value) in (bool, int, float, str)):
        yield path, value


def _ignore_progress(what: str, done: int, total: int) -> None:
    pass


def _ignore_warning(message: str) -> None:
    pass
