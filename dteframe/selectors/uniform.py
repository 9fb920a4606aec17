"""The selector that looks at nothing: every question once per epoch, in random order."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, Literal, final

import numpy as np

from dteframe import Component, Context, Selection, Selector, SelectorConfig, SuccessEstimate, hookimpl
from dteframe.records import State


class UniformConfig(SelectorConfig):
    """Options of ``uniform``: there are none."""

    type: Literal["uniform"] = "uniform"


@final
class UniformSelector(Selector):
    """Ask every question once per epoch, in random order: the baseline of every comparison.

    An epoch ends when none of the questions that may be asked now is left in it; then all count as unasked
    again. A question that may not be asked now keeps its turn while the epoch lasts. A call that spans two
    epochs finishes the old one first, and no question stands in it twice.
    """

    config: UniformConfig
    needs_estimate: ClassVar[bool] = False

    def __init__(self, config: UniformConfig, context: Context) -> None:
        """Start the first epoch."""
        super().__init__(config, context)
        self._asked: set[str] = set()  # in this epoch

    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose uniformly among the questions not yet asked in this epoch."""
        pool = estimate.in_order().question_ids
        if count > len(pool):
            raise ValueError(
                f"uniform: asked for {count} of {len(pool)} questions; at most all of them can be given"
            )
        order = rng.permutation(len(pool))
        unasked = (pool[place] for place in order if pool[place] not in self._asked)
        chosen = list(islice(unasked, count))
        if len(chosen) < count:
            finished = frozenset(chosen)
            others = (pool[place] for place in order if pool[place] not in finished)
            begun = list(islice(others, count - len(chosen)))
            self._asked = set(begun)
            chosen += begun
        else:
            self._asked.update(chosen)
        return Selection(tuple(chosen))

    def state_dict(self) -> State:
        """Give the questions asked in this epoch."""
        return {"asked": sorted(self._asked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the checkpoint's epoch."""
        self._asked = set(state["asked"])


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [UniformSelector]
