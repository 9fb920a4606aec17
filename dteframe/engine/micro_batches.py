"""Put rows in micro-batches that fit, so that a prompt is computed once for many of its completions.

In a micro-batch, rows are laid end to end with each prompt once, and equal completions of it once, and
attention keeps them apart (``engine.tiles``); or every row has a line of its own, filled up to the longest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dteframe.engine.pack import Row, balanced
from dteframe.engine.tiles import PAIRS_OF_A_CALL, Place, alone, by_group, end_to_end, tiles_of
from dteframe.flops import pairs_per_token
from dteframe.memory import MIN_SAVING, shared_prompt_tokens
from dteframe.records import ModelSizes


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the module at once; none where only other processes have work."""

    rows: tuple[Row, ...]
    shares_prompts: bool = False
    """Whether rows are laid end to end, a group's texts once; else each has a line, filled up."""

    @property
    def places(self) -> list[Place]:
        """Give where the rows stand, lines laid end to end."""
        if self.shares_prompts:
            return end_to_end(self.rows)
        starts = range(0, len(self.rows) * self.shape[1], self.shape[1])
        return [alone(row, start) for row, start in zip(self.rows, starts, strict=True)]

    @property
    def shape(self) -> tuple[int, int]:
        """Give lines and positions of each."""
        if self.shares_prompts:
            return 1, self.places[-1].end
        return max(1, len(self.rows)), max((row.num_tokens for row in self.rows), default=1)

    @property
    def shared_beginnings(self) -> list[int]:
        """Count the tokens of every row that found some computed already."""
        return [count for place in self.places for count in place.shared_beginnings]


MicroBatches: TypeAlias = tuple[MicroBatch, ...]
"""What goes through the module in turn."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What decides whether prompts are shared, for a module whose attention takes tiles."""

    sizes: ModelSizes
    checkpoints_gradients: bool = False

    def cost(self, micro_batches: MicroBatches) -> float:
        """Reckon the time of micro-batches in tokens: what is linear in them, and attention's pairs."""
        total = 0.0
        for micro_batch in micro_batches:
            num_lines, length = micro_batch.shape
            calls = [num_lines * length**2 / 2]
            if micro_batch.shares_prompts:
                calls = [tile.num_pairs for tile in tiles_of(micro_batch.places)]
            num_pairs = sum(calls) + len(calls) * PAIRS_OF_A_CALL
            total += num_lines * length + num_pairs / pairs_per_token(self.sizes)
        return total

    def charge(self, prompt_length: int, completion_length: int) -> tuple[float, float]:
        """Give the tokens of lines that take the memory of a shared prompt, and of a completion of it."""
        return shared_prompt_tokens(
            self.sizes,
            prompt_length,
            completion_length,
            gradient_checkpointing=self.checkpoints_gradients,
        )


def shared_out(rows: Sequence[Row], num_processes: int, sharing: Sharing | None) -> list[tuple[Row, ...]]:
    """Give every process like many tokens: whole groups, or parts, so that the most loaded has least to do.

    Without sharing the parts are single rows.
    """
    groups = list(by_group(rows))
    most = max((len(group) for group in groups), default=1)
    num_parts = {most} if sharing is None else {1, *(2**power for power in range(1, most.bit_length())), most}
    shares = []
    for number in sorted(num_parts):
        parts = [part for group in groups for part in _cut(group, number)]
        dealt = balanced([_num_tokens(part) for part in parts], num_processes)
        shares.append([tuple(row for index in share for row in parts[index]) for share in dealt])
    return min(shares, key=lambda dealt: max(sum(map(_num_tokens, by_group(share))) for share in dealt))


def split_alike(
    shares: Sequence[Sequence[Row]], micro_batch_tokens: int, sharing: Sharing | None
) -> list[MicroBatches]:
    """Split every process's rows as ``split`` does, and give all of them the same number of micro-batches.

    Processes meet in every pass through the module, so one that has less to do gets empty micro-batches.
    """
    parts = [split(rows, micro_batch_tokens, sharing) for rows in shares]
    most = max(len(part) for part in parts)
    return [part + (MicroBatch(()),) * (most - len(part)) for part in parts]


def split(rows: Sequence[Row], micro_batch_tokens: int, sharing: Sharing | None) -> MicroBatches:
    """Split rows into micro-batches of at most ``micro_batch_tokens``, padding included.

    Where prompts are shared, what attention repeats of them counts as the tokens that would take as much
    memory.

    Args:
        rows: in any order.
        micro_batch_tokens: a row that is longer is a micro-batch of its own.
        sharing: None for a module whose attention takes no tiles: every row is a line of its own.
    """
    in_lines = _in_lines(rows, micro_batch_tokens)
    if sharing is None or len(rows) < 2:
        return in_lines
    shared = _shared(rows, micro_batch_tokens, sharing)
    return shared if sharing.cost(shared) < (1 - MIN_SAVING) * sharing.cost(in_lines) else in_lines


def _in_lines(rows: Sequence[Row], micro_batch_tokens: int) -> MicroBatches:
    """Put rows, longest first, into micro-batches, as many as the budget holds of the longest."""
    ordered = sorted(rows, key=lambda row: -row.num_tokens)
    micro_batches, start = [], 0
    while start < len(ordered):
        num_rows = max(1, micro_batch_tokens // ordered[start].num_tokens)
        micro_batches.append(MicroBatch(tuple(ordered[start : start + num_rows])))
        start += num_rows
    return tuple(micro_batches)


def _shared(rows: Sequence[Row], micro_batch_tokens: int, sharing: Sharing) -> MicroBatches:
    """Fill micro-batches with groups, or parts of those that are too large."""
    parts: list[tuple[Row, ...]] = []
    sizes: list[float] = []
    for group in by_group(rows):
        prompt_length = len(group[0].group.group.prompt_token_ids)
        charges = [sharing.charge(prompt_length, len(row.completion.token_ids)) for row in group]
        of_prompt = max(prompt for prompt, _ in charges)
        for bin_ in _bins([completion for _, completion in charges], micro_batch_tokens - of_prompt):
            parts.append(tuple(group[index] for index in bin_))
            sizes.append(of_prompt + sum(charges[index][1] for index in bin_))
    return tuple(
        MicroBatch(together, shares_prompts=len(together) > 1)
        for bin_ in _bins(sizes, micro_batch_tokens)
        for together in [tuple(row for index in bin_ for row in parts[index])]
    )


def _bins(sizes: Sequence[float], capacity: float) -> list[list[int]]:
    """Put items, the largest first, each where it leaves the least room; give their positions by bin."""
    bins: list[list[int]] = []
    rooms: list[tuple[float, int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = bisect_left(rooms, (sizes[index], -1))
        if place == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(place)
        bins[number].append(index)
        insort(rooms, (room - sizes[index], number))
    return bins


def _cut(group: tuple[Row, ...], num_parts: int) -> list[tuple[Row, ...]]:
    """Cut a group into so many parts of like many rows, or into single rows."""
    size = -(-len(group) // num_parts)
    return [group[start : start + size] for start in range(0, len(group), size)]


def _num_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens of rows that are laid end to end."""
    return end_to_end(rows)[-1].end if rows else 0
