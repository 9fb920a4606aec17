"""Lay rows in lines that share prompts, and lines in micro-batches that fit.

A line is what the module sees as one sequence: a prompt with one completion or several, or some such one
after the other. A block mask lets every completion see its prompt and itself, so a prompt is computed once a
line, and lines are filled where rows of their own would be padded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self, TypeAlias

from dteframe.engine.pack import Row, balanced
from dteframe.flops import pairs_per_token
from dteframe.memory import shared_position_surcharge
from dteframe.records import ModelSizes

MIN_SAVING = 0.05
"""Rows that share nothing need no mask: they are preferred to lines that would save less than this."""
WIDTH_GROWTH = 1.5
"""Ratio of the line lengths that are tried."""


@dataclass(frozen=True, slots=True)
class Line:
    """Rows that are run as one sequence; those of a group stand together and share its prompt."""

    rows: tuple[Row, ...]
    num_tokens: int
    """A prompt counts once, and every completion."""

    @classmethod
    def of(cls, rows: tuple[Row, ...]) -> Self:
        """Put rows in a line."""
        return cls(rows, _num_tokens(rows))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Lines that go through the module at once; without any where only other processes have work."""

    lines: tuple[Line, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Give the rows in the order in which they are scored."""
        return tuple(row for line in self.lines for row in line.rows)

    @property
    def length(self) -> int:
        """Give the tokens of the longest line, up to which the others are filled."""
        return max((line.num_tokens for line in self.lines), default=1)

    @property
    def shares_lines(self) -> bool:
        """Whether some line holds several rows, which takes a block mask."""
        return any(len(line.rows) > 1 for line in self.lines)

    @property
    def shared_prompts(self) -> list[int]:
        """Give the tokens of a prompt for every row that found it computed already."""
        return [
            len(rows[0].group.group.prompt_token_ids)
            for line in self.lines
            for rows in _by_group(line.rows)
            for _ in rows[1:]
        ]


MicroBatches: TypeAlias = tuple[MicroBatch, ...]
"""What goes through the module in turn."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What decides how far prompts are shared, for a module that takes a block mask."""

    sizes: ModelSizes
    checkpoints_gradients: bool = False

    def cost(self, micro_batches: MicroBatches) -> float:
        """Reckon the time of micro-batches in tokens: what is linear in them, and the pairs of attention.

        A block mask hides pairs and computes them nonetheless; causal attention leaves out half of them.
        """
        total = 0.0
        for micro_batch in micro_batches:
            num_pairs = micro_batch.length * (1.0 if micro_batch.shares_lines else 0.5)
            total += (
                len(micro_batch.lines) * micro_batch.length * (1 + num_pairs / pairs_per_token(self.sizes))
            )
        return total

    def charge(self, length: int) -> float:
        """Give the tokens of rows without a mask that take the memory of one line of this length."""
        surcharge = shared_position_surcharge(
            self.sizes, length, gradient_checkpointing=self.checkpoints_gradients
        )
        return length * (1 + surcharge)


def shared_out(rows: Sequence[Row], num_processes: int, sharing: Sharing | None) -> list[tuple[Row, ...]]:
    """Give every process like many tokens: whole groups, or parts, so that the most loaded has least to do.

    Without sharing the parts are single rows.
    """
    groups = list(_by_group(rows))
    most = max((len(group) for group in groups), default=1)
    num_parts = {most} if sharing is None else {1, *(2**power for power in range(1, most.bit_length())), most}
    shares = []
    for number in sorted(num_parts):
        parts = [part for group in groups for part in _cut(group, number)]
        dealt = balanced([_num_tokens(part) for part in parts], num_processes)
        shares.append([tuple(row for index in share for row in parts[index]) for share in dealt])
    return min(shares, key=lambda dealt: max(sum(map(_num_tokens, _by_group(share))) for share in dealt))


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

    Lines of several lengths are tried, and the cheapest is taken. Where lines hold several rows, the memory
    of mask and repeated keys counts as the tokens that would take as much.

    Args:
        rows: in any order.
        micro_batch_tokens: a row that is longer is a micro-batch of its own.
        sharing: None for a module that takes no block mask: every row is a line of its own.
    """
    alone = _fill([Line.of((row,)) for row in rows], micro_batch_tokens, float)
    if sharing is None or len(rows) < 2:
        return alone
    best, least = alone, (1 - MIN_SAVING) * sharing.cost(alone)
    for width in _widths(rows):
        if sharing.charge(width) > micro_batch_tokens:
            break
        found = _fill(_lines(rows, width), micro_batch_tokens, sharing.charge)
        if sharing.cost(found) < least:
            best, least = found, sharing.cost(found)
    return best


def _fill(lines: Sequence[Line], micro_batch_tokens: int, charge: Callable[[int], float]) -> MicroBatches:
    """Put lines, longest first, into micro-batches, as many as the budget holds of the longest."""
    ordered = sorted(lines, key=lambda line: -line.num_tokens)
    micro_batches, start = [], 0
    while start < len(ordered):
        num_lines = max(1, int(micro_batch_tokens / charge(ordered[start].num_tokens)))
        micro_batches.append(MicroBatch(tuple(ordered[start : start + num_lines])))
        start += num_lines
    return tuple(micro_batches)


def _widths(rows: Sequence[Row]) -> Iterator[int]:
    """Give the line lengths to try: from that of the longest row to that of the largest group."""
    shortest = max(row.num_tokens for row in rows)
    longest = max(_num_tokens(group) for group in _by_group(rows))
    width = shortest
    while width < longest:
        yield width
        width = int(width * WIDTH_GROWTH) + 1
    yield longest


def _lines(rows: Sequence[Row], width: int) -> list[Line]:
    """Fill lines of at most ``width``: with parts of groups first, then with what these leave free."""
    parts: list[tuple[Row, ...]] = []
    for group in _by_group(rows):
        prompt_length = len(group[0].group.group.prompt_token_ids)
        sizes = [row.num_tokens - prompt_length for row in group]
        parts += [tuple(group[index] for index in bin_) for bin_ in _bins(sizes, width - prompt_length)]
    bins = _bins([_num_tokens(part) for part in parts], width)
    return [Line.of(tuple(row for index in bin_ for row in parts[index])) for bin_ in bins]


def _bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items, the largest first, each where it leaves the least room; give their positions by bin."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
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


def _by_group(rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
    """Cut rows where the group changes."""
    return (tuple(run) for _, run in groupby(rows, key=lambda row: id(row.group)))


def _cut(group: tuple[Row, ...], num_parts: int) -> list[tuple[Row, ...]]:
    """Cut a group into so many parts of like many rows, or into single rows."""
    size = -(-len(group) // num_parts)
    return [group[start : start + size] for start in range(0, len(group), size)]


def _num_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens of rows in a line."""
    return sum(
        sum(row.num_tokens for row in run) - (len(run) - 1) * len(run[0].group.group.prompt_token_ids)
        for run in _by_group(rows)
    )
