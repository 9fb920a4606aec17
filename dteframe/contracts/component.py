"""What all kinds of plugins have in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from dteframe.records import BatchArithmetic, State


class PluginConfig(BaseModel):
    """The options of a plugin: strict, closed to unknown keys, with attribute docstrings as descriptions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    type: str
    """The plugin's name in recipes; a ``Literal`` with itself as default in every plugin."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Give a small valid configuration for the promises; write files that it needs to ``folder``."""
        return cls()  # type: ignore[call-arg]  # every plugin's type has a default

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with this configuration in a run of such a size: (own key, what)."""
        yield from ()

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Yield what should be known before a run, such as a file that is not here: (own key, what)."""
        yield from ()

    def missing_packages(self) -> Iterator[str]:
        """Yield a sentence for each package that a run would need and that is not installed.

        Asked before anything is loaded; a recipe is valid without them.
        """
        yield from ()


@dataclass(frozen=True, slots=True)
class Context:
    """What every component may know of its surroundings."""

    cache_folder: Path
    """For what is costly to make again; files in it are named by the hash of everything that they depend
    on."""
    run_folder: Path
    """Where the run's files go; exists."""
    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int
    progress: Callable[[str, int, int], None]
    """Tell people how far long work is: what is being done, steps done, steps in all."""
    warn: Callable[[str], None]
    """Tell people of something that was skipped, replaced or looks wrong: one sentence that names it."""


class Component(ABC):
    """What all kinds have in common: a configuration, a context, and state that survives a checkpoint."""

    kind: ClassVar[str]
    config: PluginConfig

    def __init__(self, config: Any, context: Context) -> None:
        """Keep both; do the work in the kind's own first method, not here."""
        self.config = config
        self.context = context

    def state_dict(self) -> State:
        """Give everything that must survive a checkpoint, and nothing else: JSON values and arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, bit for bit; called after the kind's own first method."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state but the checkpoint has {sorted(state)}")
