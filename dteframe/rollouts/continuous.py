"""Continuous batching: completions that have ended leave their seats, and waiting ones take them.

A row is one completion under way. All rows write their next key and value to the same column of the cache, so
what they have read so far is aligned on the right; a mask hides what is left of it. Where rows join, or the
columns are used up, the cache is made anew for the rows that are left, with room for some more columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dteframe.records import Sampling
from dteframe.rollouts.decode import SampledRows, sample_tokens, up_to_the_end
from dteframe.rollouts.fused_decoder import FusedDecoder

ROOM_COLUMNS = 128
"""Columns that a new cache has free: it is made anew after so many tokens at the latest."""
LEAVING_FRACTION = 1 / 16
"""Rows leave once more than this fraction of them has ended: for each a row moves to its seat."""
JOINING_FRACTION = 1 / 8
"""Rows join once this fraction of the seats is free: the cache of all rows is then made anew."""
STEPS_BETWEEN_LOOKS = {"cpu": 1}
"""Tokens between looks at which rows have ended, by device; a look makes an accelerator wait."""
STEPS_BETWEEN_LOOKS_ELSEWHERE = 8


def sample_continuously(
    seats: Seats,
    prompts: Sequence[Int[np.ndarray, "prompt"]],
    max_rows: int,
    tell: Callable[[int, int], None],
) -> SampledRows:
    """Sample completions until each has ended or is as long as may be.

    Args:
        seats: still empty.
        prompts: of at least one token each; asked in this order, each for the seats' number of completions.
        max_rows: completions under way at a time.
        tell: gets the rows that have ended and the rows in all, whenever some wait no longer.
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
        seats.run_until(num_enough)
        if waiting:
            num_left = seats.num_rows + sum(len(part.rows) for part in waiting)
            tell(seats.num_all - num_left, seats.num_all)
    return seats.result()


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
    ) -> None:
        """Make room for results.

        Args:
            decoder: reads and samples.
            sampling: temperature and truncation; its length is not read.
            is_end: which tokens end a completion; on the decoder's device.
            uniforms: float64 in [0, 1), one number per token of every completion.
        """
        self._decoder, self._sampling, self._is_end = decoder, sampling, is_end
        self._longest = uniforms.shape[-1]
        device = decoder.device
        self._uniforms = torch.from_numpy(uniforms.reshape(-1)).to(device)
        self._token_ids = torch.zeros(uniforms.size, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(uniforms.size, dtype=torch.float32, device=device)
        self.num_all = uniforms.size // self._longest
        self._state = torch.zeros(4, 0, dtype=torch.int64, device=device)
        """Of each row its last token, which is yet to be read; where in the text that token is; where in the
        flat results the next one goes; and how many tokens there are."""
        self._has_ended = torch.zeros(0, dtype=torch.bool, device=device)
        self._oldest = 0
        """Tokens of the row that has most."""
        self._caches: list[Tensor] = []
        """Of each layer [keys and values, seats, heads, columns, head]; rows are on the first seats."""
        self._column = 0
        """Where the next keys and values go."""
        self._mask: Tensor | None = None
        """What is added to scores [seats, 1, columns]; None where all rows fill all columns."""
        self._steps_between_looks = STEPS_BETWEEN_LOOKS.get(device.type, STEPS_BETWEEN_LOOKS_ELSEWHERE)

    @property
    def num_rows(self) -> int:
        """Count the rows under way."""
        return self._state.shape[1]

    def result(self) -> SampledRows:
        """Give what all rows have sampled."""
        shape = (self.num_all, self._longest)
        return up_to_the_end(self._token_ids.view(shape), self._logprobs.view(shape), self._is_end)

    def make_room(self, joining: Sequence[tuple[Int[np.ndarray, "prompt"], range]]) -> None:
        """Make the caches anew with free columns; rows that join are seated after those under way."""
        num_old, device = self.num_rows, self._decoder.device
        read = read_prompts(self._decoder, [prompt for prompt, _ in joining]) if joining else None
        times = torch.tensor([len(rows) for _, rows in joining], dtype=torch.int64, device=device)
        joining_lengths = [len(prompt) for prompt, rows in joining for _ in rows]
        num_filled = np.array([*self._state[1].tolist(), *joining_lengths])
        width = int(num_filled.max())
        sizes, room = self._decoder.sizes, min(ROOM_COLUMNS, self._longest)
        shape = (2, len(num_filled), sizes.num_key_value_heads, width + room, sizes.head_size)
        for layer in range(self._decoder.num_layers):
            cache = torch.zeros(shape, dtype=self._decoder.dtype, device=device)
            if num_old:
                kept = min(width, self._column)
                old = self._caches[layer][:, :num_old, :, self._column - kept : self._column]
                cache[:, :num_old, :, width - kept : width] = old
            if read is not None:
                new = read.caches.pop(0)
                cache[:, num_old:, :, width - new.shape[3] : width] = new.repeat_interleave(times, dim=1)
            self._caches[layer : layer + 1] = [cache]
        self._column = width
        self._mask = self._mask_left_of(width - num_filled, width + room)
        if read is not None:
            self._seat(joining, joining_lengths, read.logits.repeat_interleave(times, dim=0))

    def run_until(self, num_enough: int) -> None:
        """Sample until only so many rows are under way, or all columns are filled."""
        num_columns = self._caches[0].shape[3]
        while True:
            if self._oldest == self._longest:
                self._has_ended |= self._state[3] == self._longest
            num_ended = int(self._has_ended.sum())
            is_stopping = self._oldest == self._longest or self._column == num_columns
            if num_ended > (0 if is_stopping else self.num_rows * LEAVING_FRACTION):
                self._leave(num_ended)
            if self.num_rows <= num_enough or self._column == num_columns:
                return
            num_steps = min(
                self._steps_between_looks, num_columns - self._column, self._longest - self._oldest
            )
            for _ in range(num_steps):
                self._step()

    def _seat(
        self, joining: Sequence[tuple[Int[np.ndarray, "prompt"], range]], lengths: list[int], logits: Tensor
    ) -> None:
        """Let rows join, and sample their first tokens from the logits after their prompts."""
        first = torch.tensor([row * self._longest for _, rows in joining for row in rows])
        state = torch.stack(
            [torch.zeros_like(first), torch.tensor(lengths) - 1, first, torch.zeros_like(first)]
        )
        state = state.to(self._decoder.device)
        has_ended = self._take(logits, state)
        self._state = torch.cat([self._state, state], dim=1)
        self._has_ended = torch.cat([self._has_ended, has_ended])
        self._oldest = max(self._oldest, 1)

    def _step(self) -> None:
        """Let every row read its last token and sample the next."""
        logits = self._decoder.logits(self._state[0], self._state[1], self._attend)
        self._column += 1
        self._oldest += 1
        self._has_ended |= self._take(logits, self._state)

    def _take(self, logits: Float[Tensor, "rows vocabulary"], state: Tensor) -> Bool[Tensor, "rows"]:
        """Sample a token for each row of ``state`` and note it; tell which end their completion."""
        places = state[2]
        tokens, logprobs = sample_tokens(logits, self._uniforms[places], self._sampling)
        self._token_ids[places] = tokens
        self._logprobs[places] = logprobs
        state[0] = tokens
        state[1:] += 1
        return self._is_end[tokens]

    def _attend(self, layer: int, fused: Float[Tensor, "rows fused"]) -> Float[Tensor, "rows query"]:
        """Put the rows' keys and values into the cache; mix the values of all columns filled so far."""
        sizes, num_rows, filled = self._decoder.sizes, len(fused), self._column + 1
        cache = self._caches[layer]
        new = fused[:, sizes.query :].view(num_rows, 2, sizes.num_key_value_heads, sizes.head_size)
        cache[:, :num_rows, :, self._column] = new.transpose(0, 1)
        keys, values = cache[:, :num_rows, :, :filled].unbind()
        queries = fused[:, : sizes.query]
        mask = None if self._mask is None else self._mask[:num_rows, :, :filled]
        if not self._decoder.is_folded:
            queries = queries.view(num_rows, sizes.num_key_value_heads, -1, sizes.head_size)
            mask = None if mask is None else mask[:, None]
            mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            return mixed.reshape(num_rows, sizes.query)
        # For a single token these three products are faster than torch's attention, which divides its work
        # by rows and heads.
        queries = queries.reshape(num_rows * sizes.num_key_value_heads, -1, sizes.head_size)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        if mask is None:
            scores = torch.bmm(queries, keys.transpose(1, 2))
        else:
            spread = mask.repeat_interleave(sizes.num_key_value_heads, dim=0)
            scores = torch.baddbmm(spread, queries, keys.transpose(1, 2))
        return torch.bmm(scores.softmax(dim=-1), values).view(num_rows, sizes.query)

    def _leave(self, num_ended: int) -> None:
        """Give the seats of ended rows to rows at the back, so that rows sit together."""
        num_left = self.num_rows - num_ended
        has_ended = self._has_ended.cpu().numpy()
        freed = np.flatnonzero(has_ended[:num_left])
        moving = num_left + np.flatnonzero(~has_ended[num_left:])
        if len(freed):
            to, origin = (torch.from_numpy(seats).to(self._decoder.device) for seats in (freed, moving))
            self._state[:, to] = self._state[:, origin]
            for cache in self._caches:
                cache[:, to, :, : self._column] = cache[:, origin, :, : self._column]
            if self._mask is not None:
                self._mask[to] = self._mask[origin]
        self._state = self._state[:, :num_left]
        self._has_ended = torch.zeros_like(self._has_ended[:num_left])
        self._oldest = int(self._state[3].max()) if num_left else 0

    def _mask_left_of(self, starts: Int[np.ndarray, "rows"], num_columns: int) -> Tensor | None:
        """Hide the columns before each row's first."""
        if not starts.any():
            return None
        is_hidden = torch.from_numpy(np.arange(num_columns) < starts[:, None])
        mask = torch.zeros(len(starts), 1, num_columns, dtype=self._decoder.dtype)
        return mask.masked_fill_(is_hidden[:, None], -math.inf).to(self._decoder.device)


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts that the decoder has read, once each."""

    caches: list[Float[Tensor, "2 prompts heads width head"]]
    """Keys and values of each layer, aligned on the right; meaningless left of a prompt."""
    logits: Float[Tensor, "prompts vocabulary"]
    """Of the token after the prompt."""


def read_prompts(decoder: FusedDecoder, prompts: Sequence[Int[np.ndarray, "prompt"]]) -> ReadPrompts:
    """Run the decoder over prompts, laid end to end: only attention sees padding."""
    sizes, device = decoder.sizes, decoder.device
    lengths = np.array([len(prompt) for prompt in prompts])
    width, last = int(lengths.max()), lengths.cumsum() - 1
    columns = np.arange(width)
    first = (last + 1 - lengths)[:, None]
    is_token = columns < lengths[:, None]
    aligned_left = torch.from_numpy(np.where(is_token, first + columns, 0)).to(device)
    places = np.where(is_token[:, ::-1], last[:, None] + 1 - width + columns, 0)
    aligned_right = torch.from_numpy(places).to(device)
    tokens_among_padded = torch.from_numpy(np.flatnonzero(is_token)).to(device)
    caches: list[Tensor] = []

    def attention(layer: int, fused: Tensor) -> Tensor:
        padded = fused[aligned_left].view(len(prompts), width, -1, sizes.head_size).transpose(1, 2)
        heads = (sizes.num_heads, sizes.num_key_value_heads, sizes.num_key_value_heads)
        queries, keys, values = padded.split_with_sizes(heads, dim=1)
        # What a prompt's token may see is all to its left, where there is no padding.
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=decoder.attention_scale, enable_gqa=True
        )
        kept = fused[:, sizes.query :][aligned_right]
        kept = kept.view(len(prompts), width, 2, sizes.num_key_value_heads, sizes.head_size)
        caches.append(kept.permute(2, 0, 3, 1, 4))
        return mixed.transpose(1, 2).reshape(-1, sizes.query)[tokens_among_padded]

    token_ids = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    kept = torch.from_numpy(last).to(device)
    logits = decoder.logits(token_ids, positions, attention, kept)
    return ReadPrompts(caches, logits)
