"""Lay rows end to end with each text once, and cut their attention into calls that compute little unseen.

A completion sees its prompt and itself. So attention is a set of stretches: a prompt, a completion after its
prompt, or both in one. Stretches of like lengths make a tile, which is one call of attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import numpy as np
from jaxtyping import Bool, Int

from dteframe.engine.pack import Row

WASTE = 0.25
"""Pairs that a tile may compute for nothing, as a share of those of its stretches."""
PAIRS_OF_A_CALL = 4096
"""Pairs that take as long as one more call: measured on a CPU at a query width of 128."""
UNLIKE_CONTEXTS_PAIRS = 2**18
"""Contexts of several lengths in a tile need a mask for every stretch: larger tiles keep to one length."""
LONG_CONTEXT = 128
"""Tokens from which on contexts of unlike lengths are kept apart if they can be."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of one group stand, its prompt first, and completions of the same tokens once."""

    rows: tuple[Row, ...]
    start: int
    """Of the prompt."""
    completion_starts: tuple[int, ...]
    """Of each row; equal ones where completions are."""

    @property
    def prompt_token_ids(self) -> Int[np.ndarray, "tokens"]:
        """Give the prompt."""
        return self.rows[0].group.group.prompt_token_ids

    @property
    def end(self) -> int:
        """Give the place after the last completion."""
        return max(start + length for start, length in self.completions.items())

    @property
    def completions(self) -> dict[int, int]:
        """Give start and length of each completion that is computed."""
        rows = zip(self.completion_starts, self.rows, strict=True)
        return {start: len(row.completion.token_ids) for start, row in rows}

    @property
    def shared_beginnings(self) -> list[int]:
        """Count the tokens that were computed already for another row: the prompt, or the whole row."""
        firsts, counts = {self.completion_starts[0]}, []
        for row, start in zip(self.rows[1:], self.completion_starts[1:], strict=True):
            counts.append(row.num_tokens if start in firsts else len(self.prompt_token_ids))
            firsts.add(start)
        return counts


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens of which each sees those before it: a context, and some after it."""

    context_start: int
    context_length: int
    """Tokens of the prompt; 0 for a prompt by itself."""
    start: int
    length: int

    @property
    def asks_context(self) -> bool:
        """Whether the context's attention is computed along with it because that takes fewer pairs.

        Those of the whole are half a square; those of the rest are a rectangle, hidden corner and all.
        """
        return self.context_length <= self.length


@dataclass(frozen=True, slots=True)
class Tile:
    """Stretches whose attention is one call, filled up to equal lengths."""

    stretches: tuple[Stretch, ...]
    asks_contexts: bool
    """Whether all positions ask, which takes no mask: what is filled up stands on the right, unseen."""
    context_length: int
    """Positions on the left that do not ask."""
    shortest_context: int
    """How many of them are filled with tokens in every stretch."""
    length: int
    """Positions that ask."""

    @classmethod
    def of(cls, item: Stretch) -> Self:
        """Make a tile of one stretch."""
        if item.asks_context:
            return cls((item,), True, 0, 0, item.context_length + item.length)
        return cls((item,), False, item.context_length, item.context_length, item.length)

    def grown_by(self, item: Stretch) -> Tile:
        """Add a stretch that asks for its context if these do."""
        other = Tile.of(item)
        return Tile(
            (*self.stretches, item),
            self.asks_contexts,
            max(self.context_length, other.context_length),
            min(self.shortest_context, other.shortest_context),
            max(self.length, other.length),
        )

    @property
    def num_pairs(self) -> float:
        """Count the pairs that are computed."""
        of_a_token = self.length / 2 if self.asks_contexts else self.context_length + self.length
        return len(self.stretches) * self.length * of_a_token

    @property
    def num_positions(self) -> int:
        """Count the keys, repeated and filled up."""
        return len(self.stretches) * (self.context_length + self.length)

    def places(self) -> Int[np.ndarray, "stretches positions"]:
        """Give the token of every position, and some token of the stretch where it is filled up."""
        first = np.array([[item.start] for item in self.stretches])
        places = np.repeat(first, self.context_length + self.length, axis=1)
        for row, item in zip(places, self.stretches, strict=True):
            start = 0 if self.asks_contexts else self.context_length - item.context_length
            middle = start + item.context_length
            row[start:middle] = np.arange(item.context_start, item.context_start + item.context_length)
            row[middle : middle + item.length] = np.arange(item.start, item.start + item.length)
        return places

    def answers(self) -> Int[np.ndarray, "2 tokens"]:
        """Give tokens, and for each the position that has its result: asking ones count, laid end to end."""
        found = []
        for number, item in enumerate(self.stretches):
            first = number * self.length
            if self.asks_contexts:
                context = np.arange(item.context_length)
                found.append([item.context_start + context, first + context])
                first += item.context_length
            own = np.arange(item.length)
            found.append([item.start + own, first + own])
        return np.concatenate(found, axis=1)

    def seen(self) -> Bool[np.ndarray, "masks asking positions"] | None:
        """Say who sees whom, in one mask or one for each stretch; None for all that stands before."""
        if self.asks_contexts:
            return None
        contexts = np.array([item.context_length for item in self.stretches])
        if self.shortest_context == self.context_length:
            contexts = contexts[:1]
        begins = (self.context_length - contexts)[:, None, None]
        keys = np.arange(self.context_length + self.length)
        last = self.context_length + np.arange(self.length)
        seen: Bool[np.ndarray, "masks asking positions"] = (keys >= begins) & (keys <= last[:, None])
        return seen


def by_group(rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
    """Cut rows where the group changes."""
    return (tuple(run) for _, run in groupby(rows, key=lambda row: id(row.group)))


def end_to_end(rows: Sequence[Row]) -> list[Place]:
    """Place groups one after the other: each prompt, then its completions, equal ones once."""
    places, end = [], 0
    for run in by_group(rows):
        start, end = end, end + len(run[0].group.group.prompt_token_ids)
        starts: dict[bytes, int] = {}
        for row in run:
            if starts.setdefault(row.completion.token_ids.tobytes(), end) == end:
                end += len(row.completion.token_ids)
        found = (starts[row.completion.token_ids.tobytes()] for row in run)
        places.append(Place(run, start, tuple(found)))
    return places


def alone(row: Row, start: int) -> Place:
    """Place a row by itself."""
    return Place((row,), start, (start + len(row.group.group.prompt_token_ids),))


def tiles_of(places: Sequence[Place]) -> tuple[Tile, ...]:
    """Cut attention into few calls that compute little for nothing."""
    whole, after = [], []
    for place in places:
        prompt_length = len(place.prompt_token_ids)
        found = [
            Stretch(place.start, prompt_length, start, length) for start, length in place.completions.items()
        ]
        after += [item for item in found if not item.asks_context]
        found = [item for item in found if item.asks_context]
        whole += found or [Stretch(place.start, 0, place.start, prompt_length)]
    whole.sort(key=lambda item: -item.context_length - item.length)
    after.sort(key=lambda item: (-_order_of(item.context_length), -item.length))
    return (*_tiled(whole), *_tiled(after))


def _order_of(context_length: int) -> int:
    """Sort by long contexts, and by half octaves of short ones, so that completions of like lengths meet."""
    if context_length > LONG_CONTEXT:
        return context_length
    return int(2 * math.log2(context_length))


def _tiled(stretches: Sequence[Stretch]) -> Iterator[Tile]:
    """Cut a run of stretches where one more would cost more than a call of its own."""
    tile, num_needed = None, 0.0
    for item in stretches:
        alone = Tile.of(item)
        grown = alone if tile is None else tile.grown_by(item)
        num_needed += alone.num_pairs
        if tile is not None and not _is_worth_it(grown, num_needed):
            yield tile
            grown, num_needed = alone, alone.num_pairs
        tile = grown
    if tile is not None:
        yield tile


def _is_worth_it(tile: Tile, num_needed: float) -> bool:
    """Whether a tile computes few pairs more than are needed, and has few masks."""
    if tile.shortest_context < tile.context_length and tile.num_pairs > UNLIKE_CONTEXTS_PAIRS:
        return False
    return tile.num_pairs - num_needed <= max(WASTE * num_needed, PAIRS_OF_A_CALL)
