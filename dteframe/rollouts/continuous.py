"""Continuous batching: completions that have ended leave their seats, and waiting ones take them.

A row is one completion under way; rows sit side by side in the batch. Where rows join, or the columns of the
cache are used up, the cache is made anew for the rows that are left, with room for some more columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dteframe.records import Sampling
from dteframe.rollouts.decode import SampledRows, sample_tokens, up_to_the_end
from dteframe.rollouts.fused_decoder import FusedDecoder
from dteframe.rollouts.key_value_cache import KeyValueCache, read_prompts

ROOM_COLUMNS = 128
"""Columns that a new cache has free: it is made anew after so many tokens at the latest."""
LEAVING_FRACTION = 1 / 16
"""Rows leave once more than this fraction of them has ended: for each a row moves to its seat."""
JOINING_FRACTION = 1 / 8
"""Rows join once this fraction of the seats is free: the cache of all rows is then made anew."""
SHARED_FROM_COLUMNS = 96
"""Prompts of at least so many tokens on average are kept once; shorter ones cost less in every row."""
STEPS_BETWEEN_LOOKS = {"cpu": 1}
"""Tokens between looks at which rows have ended, by device; a look makes an accelerator wait."""
STEPS_BETWEEN_LOOKS_ELSEWHERE = 8


def sample_continuously(
    seats: Seats,
    prompts: Sequence[Int[np.ndarray, "prompt"]],
    max_rows: int,
    tell: Callable[[int, int], None],
) -> Iterator[tuple[list[int], SampledRows]]:
    """Sample completions until each has ended or is as long as may be; give those of a prompt as they end.

    Args:
        seats: still empty.
        prompts: of at least one token each; asked in this order, each for the seats' number of completions.
        max_rows: completions under way at a time.
        tell: gets the rows that have ended and the rows in all, whenever some wait no longer.

    Returns:
        An iterator of the places of prompts whose completions have ended by now, and these.
    """
    waiting = _parts(len(prompts), seats.num_all // len(prompts), max_rows)
    while waiting or seats.num_rows:
        joining = []
        num_free = max_rows - seats.num_rows
        while waiting and len(waiting[0].rows) <= num_free:
            num_free -= len(waiting[0].rows)
            joining.append(waiting.pop(0))
        seats.make_room([(prompts[part.prompt], part.rows) for part in joining])
        num_enough = 0
        if waiting:
            num_enough = max_rows - max(len(waiting[0].rows), math.ceil(max_rows * JOINING_FRACTION))
        for ended in seats.run_until(num_enough):
            yield ended, seats.result(ended)
        if waiting:
            num_left = seats.num_rows + sum(len(part.rows) for part in waiting)
            tell(seats.num_all - num_left, seats.num_all)


def shares_prompts(decoder: FusedDecoder, prompts: Sequence[Int[np.ndarray, "prompt"]]) -> bool:
    """Say whether prompts are better kept once than in each of their rows."""
    num_tokens = sum(len(prompt) for prompt in prompts)
    return decoder.is_folded and num_tokens >= SHARED_FROM_COLUMNS * len(prompts)


@dataclass(frozen=True, slots=True)
class _Part:
    """Completions of one prompt that take their seats together."""

    prompt: int
    rows: range


def _parts(num_prompts: int, num_generations: int, max_rows: int) -> list[_Part]:
    """Cut groups that are larger than the seats; the others stay whole, so that a prompt is read once."""
    return [
        _Part(prompt, range(start + first, start + min(first + max_rows, num_generations)))
        for prompt, start in enumerate(range(0, num_prompts * num_generations, num_generations))
        for first in range(0, num_generations, max_rows)
    ]


class Seats:
    """Rows under way, side by side in the batch, and what all rows have sampled so far."""

    def __init__(
        self,
        decoder: FusedDecoder,
        sampling: Sampling,
        is_end: Bool[Tensor, "vocabulary"],
        uniforms: Float[np.ndarray, "prompts generations longest"],
        *,
        shares_prompts: bool,
    ) -> None:
        """Make room for results.

        Args:
            decoder: reads and samples.
            sampling: temperature and truncation; its length is not read.
            is_end: which tokens end a completion; on the decoder's device.
            uniforms: float64 in [0, 1), one number per token of every completion.
            shares_prompts: keep a prompt's keys and values once, and not in each of its rows.
        """
        self._decoder, self._sampling, self._is_end = decoder, sampling, is_end
        self._longest = uniforms.shape[-1]
        device = decoder.device
        self._uniforms = torch.from_numpy(uniforms.reshape(-1)).to(device)
        self._token_ids = torch.zeros(uniforms.size, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(uniforms.size, dtype=torch.float32, device=device)
        self.num_all = uniforms.size // self._longest
        self._rows_of_a_prompt = uniforms.shape[1]
        self._num_open = np.full(uniforms.shape[0], uniforms.shape[1])
        """Rows of each prompt that have not left."""
        self._state = torch.zeros(4, 0, dtype=torch.int64, device=device)
        """Of each row its last token, which is yet to be read; where in the text that token is; where in the
        flat results the next one goes; and how many tokens there are."""
        self._has_ended = torch.zeros(0, dtype=torch.bool, device=device)
        self._oldest = 0
        """Tokens of the row that has most."""
        self._cache = KeyValueCache(decoder, shares_prompts)
        self._steps_between_looks = STEPS_BETWEEN_LOOKS.get(device.type, STEPS_BETWEEN_LOOKS_ELSEWHERE)

    @property
    def num_rows(self) -> int:
        """Count the rows under way."""
        return self._state.shape[1]

    def result(self, prompts: list[int]) -> SampledRows:
        """Give what the rows of some prompts have sampled."""
        token_ids, logprobs = (
            sampled.view(-1, self._rows_of_a_prompt, self._longest)[prompts].flatten(0, 1)
            for sampled in (self._token_ids, self._logprobs)
        )
        return up_to_the_end(token_ids, logprobs, self._is_end)

    def make_room(self, joining: Sequence[tuple[Int[np.ndarray, "prompt"], range]]) -> None:
        """Make the cache anew with free columns; rows that join are seated after those under way."""
        read = read_prompts(self._decoder, [prompt for prompt, _ in joining]) if joining else None
        times = [len(rows) for _, rows in joining]
        self._cache.make_room(read, times, min(ROOM_COLUMNS, self._longest))
        if read is not None:
            rows = np.concatenate([np.array(rows) for _, rows in joining])
            self._seat(
                rows,
                read.lengths.repeat(times),
                read.logits.repeat_interleave(torch.tensor(times, device=self._decoder.device), dim=0),
            )

    def run_until(self, num_enough: int) -> Iterator[list[int]]:
        """Sample until only so many rows are under way, or all columns are filled.

        Returns:
            An iterator of prompts, as the last of their rows leave.
        """
        cache = self._cache
        while True:
            if self._oldest == self._longest:
                self._has_ended |= self._state[3] == self._longest
            num_ended = int(self._has_ended.sum())
            is_stopping = self._oldest == self._longest or cache.column == cache.num_columns
            if num_ended > (0 if is_stopping else self.num_rows * LEAVING_FRACTION):
                if ended := self._leave(num_ended):
                    yield ended
            if self.num_rows <= num_enough or cache.column == cache.num_columns:
                return
            num_steps = min(
                self._steps_between_looks, cache.num_columns - cache.column, self._longest - self._oldest
            )
            for _ in range(num_steps):
                self._step()

    def _seat(self, rows: Int[np.ndarray, "rows"], lengths: Int[np.ndarray, "rows"], logits: Tensor) -> None:
        """Let rows join, and sample their first tokens from the logits after their prompts."""
        zeros = np.zeros_like(rows)
        state = torch.from_numpy(np.stack([zeros, lengths - 1, rows * self._longest, zeros]))
        state = state.to(self._decoder.device)
        has_ended = self._take(logits, state)
        self._state = torch.cat([self._state, state], dim=1)
        self._has_ended = torch.cat([self._has_ended, has_ended])
        self._oldest = max(self._oldest, 1)

    def _step(self) -> None:
        """Let every row read its last token and sample the next."""
        logits = self._decoder.logits(self._state[0], self._state[1], self._cache.attend)
        self._cache.advance()
        self._oldest += 1
        self._has_ended |= self._take(logits, self._state)

    def _take(self, logits: Float[Tensor, "rows vocabulary"], state: Tensor) -> Bool[Tensor, "rows"]:
        """Sample a token for each row of ``state`` and note it; tell which end their completion."""
        places = state[2]
        uniforms = self._uniforms.index_select(0, places)
        tokens, logprobs = sample_tokens(logits, uniforms, self._sampling)
        self._token_ids.index_copy_(0, places, tokens)
        self._logprobs.index_copy_(0, places, logprobs)
        state[0] = tokens
        state[1:] += 1
        return self._is_end.index_select(0, tokens)

    def _leave(self, num_ended: int) -> list[int]:
        """Give the seats of ended rows to rows at the back; tell the prompts that have no other rows left."""
        num_left = self.num_rows - num_ended
        has_ended = self._has_ended.cpu().numpy()
        # The next token's place is one behind the row's own when the row is full.
        rows = (self._state[2].cpu().numpy()[has_ended] - 1) // self._longest
        prompts = rows // self._rows_of_a_prompt
        np.subtract.at(self._num_open, prompts, 1)
        freed = np.flatnonzero(has_ended[:num_left])
        moving = num_left + np.flatnonzero(~has_ended[num_left:])
        if len(freed):
            to, origin = (torch.from_numpy(seats).to(self._decoder.device) for seats in (freed, moving))
            self._state[:, to] = self._state[:, origin]
        self._cache.move(freed, moving, num_left)
        self._state = self._state[:, :num_left]
        self._has_ended = torch.zeros_like(self._has_ended[:num_left])
        self._oldest = int(self._state[3].max()) if num_left else 0
        return [int(prompt) for prompt in np.unique(prompts) if self._num_open[prompt] == 0]
