r"""Chained operations on short digit lists: the task family that everything is measured on without a GPU.

A question is a chain of one-letter operations and a list: ``r+<:3142`` asks to reverse 3142, then add one to
each digit, then rotate left. The worked solution writes each operation and the list after it, then the answer
behind a colon: ``r2413+3524<5243:5243``. One algorithm solves every length, and one slip anywhere spoils the
answer, so the success rate falls with the chain: that is the difficulty.

The form is made for tiny character models. The list to work on always stands one list back, the next
operation is what follows the last one in the question, and after the last operation follows the colon. That
is why no operation occurs twice in a chain, unless ``repeats`` is set: then the last operation does not tell
which is next, the policy has to count, and such chains are harder than their length alone makes them. The
reward ``exact_match`` finds the answer with the pattern ``:(\d+)$``.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, NamedTuple, Self, TypeAlias, final

from pydantic import Field, model_validator

from dteframe import Component, Dataset, DatasetConfig, Question, Questions, hookimpl
from dteframe.datasets.mixture import divided

Digits: TypeAlias = tuple[int, ...]
OperationName: TypeAlias = Literal[
    "reverse", "rotate_left", "rotate_right", "increment", "decrement", "double", "swap_ends", "sort"
]


class Operation(NamedTuple):
    """What a letter of the chain does to a list; the length of the list stays."""

    symbol: str
    apply: Callable[[Digits], Digits]


OPERATIONS: Final[Mapping[OperationName, Operation]] = MappingProxyType(
    {
        "reverse": Operation("r", lambda digits: digits[::-1]),
        "rotate_left": Operation("<", lambda digits: digits[1:] + digits[:1]),
        "rotate_right": Operation(">", lambda digits: digits[-1:] + digits[:-1]),
        "increment": Operation("+", lambda digits: tuple((digit + 1) % 10 for digit in digits)),
        "decrement": Operation("-", lambda digits: tuple((digit - 1) % 10 for digit in digits)),
        "double": Operation("d", lambda digits: tuple(2 * digit % 10 for digit in digits)),
        "swap_ends": Operation("x", lambda digits: digits[-1:] + digits[1:-1] + digits[:1]),
        "sort": Operation("s", lambda digits: tuple(sorted(digits))),
    }
)
"""All operations by name; arithmetic is modulo 10, digit by digit."""


class ListOperationsConfig(DatasetConfig):
    """Options of ``list_operations``; prompts stay below 32 characters, solutions below 200."""

    type: Literal["list_operations"] = "list_operations"
    size: int = Field(default=4096, ge=1)
    """Distinct questions, held-out ones included."""
    chain_lengths: list[Annotated[int, Field(ge=1, le=20)]] = Field(default=[1, 2, 3, 4, 5, 6], min_length=1)
    """Operations in a chain, 1 to 20; every length listed gets its share of the questions."""
    chain_length_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """Share of each of ``chain_lengths``, in their order, in any unit; null: equal shares."""
    list_length: int = Field(default=4, ge=2, le=8)
    """Digits in the list."""
    operations: list[OperationName] = Field(
        default=["reverse", "rotate_left", "rotate_right", "increment", "decrement", "double", "swap_ends"],
        min_length=1,
    )
    """What chains are drawn from, all equally often."""
    repeats: bool = False
    """Let an operation occur several times in a chain, so that chains can be longer than ``operations``. The
    policy has to count then how many it has done, which is harder."""
    longest_solution: int | None = Field(default=None, ge=0)
    """Longest chain that comes with a worked solution for a warm-up; null: all do, 0: none does."""
    seed: int = Field(default=0, ge=0)
    """Of the questions; another seed gives other questions, whatever the recipe's seed."""

    @model_validator(mode="after")
    def _lists_fit_together(self) -> Self:
        for name in ("chain_lengths", "operations"):
            repeated = [value for value, times in Counter(getattr(self, name)).items() if times > 1]
            if repeated:
                raise ValueError(f"{name}: {repeated[0]!r} is listed twice; list it once")
        weights = self.chain_length_weights
        if weights is not None and len(weights) != len(self.chain_lengths):
            raise ValueError(
                f"chain_length_weights: {len(weights)} weights for {len(self.chain_lengths)} chain_lengths; "
                "give one weight per length"
            )
        if max(self.chain_lengths) > len(self.operations) and not self.repeats:
            raise ValueError(
                f"chain_lengths: {max(self.chain_lengths)} different operations are wanted but operations "
                f"lists {len(self.operations)}; shorten the chains, list more, or set repeats: true"
            )
        for chain_length, wanted in self.num_questions_by_chain_length().items():
            possible = self.num_possible(chain_length)
            if wanted > possible:
                raise ValueError(
                    f"size: {wanted} questions of chain length {chain_length} are wanted but only {possible} "
                    "differ; lower size, give longer lists, longer chains or more operations, or set "
                    "repeats: true"
                )
        return self

    def num_possible(self, chain_length: int) -> int:
        """Count the different questions of a chain length."""
        num_operations = len(self.operations)
        chains = num_operations**chain_length if self.repeats else math.perm(num_operations, chain_length)
        return int(10**self.list_length * chains)

    def num_questions_by_chain_length(self) -> dict[int, int]:
        """Divide ``size`` over the chain lengths by weight."""
        weights = self.chain_length_weights or [1.0] * len(self.chain_lengths)
        return dict(zip(self.chain_lengths, divided(self.size, weights), strict=True))

    def num_questions(self) -> int:
        """Give ``size``."""
        return self.size

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Sixty questions of one to three operations."""
        return cls(size=60, chain_lengths=[1, 2, 3])


@final
class ListOperations(Dataset):
    """Chains of operations on short digit lists, with worked solutions: harder the longer the chain."""

    config: ListOperationsConfig

    def load(self) -> Questions:
        """Make the questions: the same for the same configuration, in a shuffled order."""
        questions = [
            self._question(chain_length, number, index)
            for chain_length, count in self.config.num_questions_by_chain_length().items()
            for number, index in enumerate(self._draw_indices(chain_length, count))
        ]
        random.Random(f"order {self.config.seed}").shuffle(questions)
        return Questions(train=tuple(questions))

    def _draw_indices(self, chain_length: int, count: int) -> list[int]:
        # One stream per chain length: asking for another length as well leaves these questions as they are.
        generator = random.Random(f"chain length {chain_length}, seed {self.config.seed}")
        possible = self.config.num_possible(chain_length)
        if possible <= sys.maxsize:
            return generator.sample(range(possible), count)
        drawn: dict[int, None] = {}  # random.sample takes no longer range; next to none is drawn twice
        while len(drawn) < count:
            drawn[generator.randrange(possible)] = None
        return list(drawn)

    def _question(self, chain_length: int, number: int, index: int) -> Question:
        digits, chain = self._decode(index, chain_length)
        text = f"{''.join(OPERATIONS[name].symbol for name in chain)}:{written(digits)}"
        solution, answer = work_out(digits, chain)
        longest = self.config.longest_solution
        return Question(
            id=f"chain{chain_length}-{number:05d}",
            text=text,
            prompt=text,
            answer=answer,
            solution=solution if longest is None or chain_length <= longest else None,
            columns={"chain_length": chain_length, "operations": list(chain)},
        )

    def _decode(self, index: int, chain_length: int) -> tuple[Digits, tuple[OperationName, ...]]:
        digits, chain = [], []
        for _ in range(self.config.list_length):
            index, digit = divmod(index, 10)
            digits.append(digit)
        available = list(self.config.operations)
        for _ in range(chain_length):
            index, place = divmod(index, len(available))
            chain.append(available[place] if self.config.repeats else available.pop(place))
        return tuple(digits), tuple(chain)


def work_out(digits: Digits, chain: tuple[OperationName, ...]) -> tuple[str, str]:
    """Apply a chain step by step.

    Returns:
        The worked solution and the answer that it ends in: ``("r2413+3524:3524", "3524")``.
    """
    lines = []
    for name in chain:
        digits = OPERATIONS[name].apply(digits)
        lines.append(OPERATIONS[name].symbol + written(digits))
    answer = written(digits)
    return f"{''.join(lines)}:{answer}", answer


def written(digits: Digits) -> str:
    """Write a list as the model reads it: ``(3, 1, 4)`` as ``314``."""
    return "".join(str(digit) for digit in digits)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [ListOperations]
