"""The keys and values of rows that are sampled side by side, and their attention.

All rows write their next key and value to the same column, so what they hold is aligned on the right, and a
mask hides what is left of it. Short prompts are copied to each of their rows. Long ones stay where they are,
and all rows of a group attend to theirs in one product; a row then joins the two in one softmax, in which
the whole prompt is one more key: its score is the logarithm of the sum of its exponentials, its value
is what they mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dteframe.rollouts.fused_decoder import FusedDecoder


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts that the decoder has read, once each."""

    caches: list[Float[Tensor, "2 prompts heads width head"]]
    """Keys and values of each layer, aligned on the right; meaningless left of a prompt."""
    lengths: Int[np.ndarray, "prompts"]
    logits: Float[Tensor, "prompts vocabulary"]
    """Of the token after the prompt."""


class KeyValueCache:
    """Keys and values of the rows on seats 0, 1, 2, ..."""

    def __init__(self, decoder: FusedDecoder, shares_prompts: bool) -> None:
        """Be empty.

        Args:
            decoder: whose keys and values these are.
            shares_prompts: keep prompts once, and not in each of their rows; needs float32.
        """
        self._decoder, self._sizes = decoder, decoder.sizes
        self.column = 0
        """Where the next keys and values go."""
        self.num_columns = 0
        self._filled = np.zeros(0, dtype=np.int64)
        """Columns that each row fills."""
        self._layers: list[Tensor] = []
        """Of each layer [keys and values, seats x heads, columns, head]."""
        self._mask: Tensor | None = None
        """What is added to scores [seats x heads, 1, columns]; None where all rows fill all columns."""
        self._prompts = _SharedPrompts(decoder) if shares_prompts else None

    def advance(self) -> None:
        """Go on to the next column."""
        self.column += 1
        self._filled += 1

    def make_room(self, read: ReadPrompts | None, times: Sequence[int], num_free: int) -> None:
        """Make the cache anew for the rows under way and for those that join after them.

        Args:
            read: prompts of rows that join, if any do; its caches are used up.
            times: how many rows of each of these prompts join.
            num_free: columns that are to be free.
        """
        num_old, heads = len(self._filled), self._sizes.num_key_value_heads
        copied: list[Tensor] = []
        if read is not None and self._prompts is not None:
            self._prompts.join(read, times)
            self._filled = np.append(self._filled, np.zeros(sum(times), dtype=np.int64))
        elif read is not None:
            copied = read.caches
            self._filled = np.append(self._filled, read.lengths.repeat(times))
        width = int(self._filled.max())
        kept, repeats = min(width, self.column), torch.tensor(times, device=self._decoder.device)
        shape = (2, len(self._filled), heads, width + num_free, self._sizes.head_size)
        for layer in range(self._decoder.num_layers):
            cache = torch.zeros(shape, dtype=self._decoder.dtype, device=self._decoder.device)
            if num_old:
                old = self._layers[layer].unflatten(1, (-1, heads))  # type: ignore[no-untyped-call]  # torch's
                cache[:, :num_old, :, width - kept : width] = old[
                    :, :num_old, :, self.column - kept : self.column
                ]
            if copied:
                new = copied.pop(0)
                cache[:, num_old:, :, width - new.shape[3] : width] = new.repeat_interleave(repeats, dim=1)
            self._layers[layer : layer + 1] = [cache.flatten(1, 2)]
        self.column, self.num_columns = width, width + num_free
        self._mask = _mask_left_of(width - self._filled, self.num_columns, self._decoder)

    def move(self, freed: Int[np.ndarray, "moved"], moving: Int[np.ndarray, "moved"], num_left: int) -> None:
        """Move rows to seats that have become free, and keep the first ``num_left`` seats."""
        if len(freed):
            heads = np.arange(self._sizes.num_key_value_heads)
            to, origin = (
                torch.from_numpy((seats[:, None] * len(heads) + heads).ravel()).to(self._decoder.device)
                for seats in (freed, moving)
            )
            for cache in self._layers:
                cache[:, to, : self.column] = cache[:, origin, : self.column]
            if self._mask is not None:
                self._mask[to] = self._mask[origin]
            self._filled[freed] = self._filled[moving]
        self._filled = self._filled[:num_left]
        if self._prompts is not None:
            self._prompts.move(freed, moving, num_left)

    def attend(self, layer: int, fused: Float[Tensor, "rows fused"]) -> Float[Tensor, "rows query"]:
        """Keep the rows' keys and values; mix the values of all columns filled so far."""
        sizes, num_rows = self._sizes, len(fused)
        num_heads, filled = num_rows * sizes.num_key_value_heads, self.column + 1
        cache = self._layers[layer]
        keys, values = cache[0, :num_heads, :filled], cache[1, :num_heads, :filled]
        new = fused[:, sizes.query :].view(num_rows, 2, sizes.num_key_value_heads, sizes.head_size)
        place = cache[:, :num_heads, self.column].view(2, *new.shape[:1], *new.shape[2:])
        place.copy_(new.transpose(0, 1))
        mask = None if self._mask is None else self._mask[:num_heads, :, :filled]
        queries = fused[:, : sizes.query].reshape(num_heads, -1, sizes.head_size)
        if not self._decoder.is_folded:
            shape = (num_rows, sizes.num_key_value_heads)
            mixed = functional.scaled_dot_product_attention(
                queries.unflatten(0, shape),  # type: ignore[no-untyped-call]  # torch's
                keys.unflatten(0, shape),  # type: ignore[no-untyped-call]
                values.unflatten(0, shape),  # type: ignore[no-untyped-call]
                attn_mask=None if mask is None else mask.unflatten(0, shape),  # type: ignore[no-untyped-call]
            )
            return mixed.reshape(num_rows, sizes.query)
        # For a single token a row these products are faster than torch's attention, which divides its work by
        # rows and heads.
        scores = _scores(queries, keys, mask)
        if self._prompts is None:
            return torch.bmm(scores.softmax(dim=-1), values).view(num_rows, sizes.query)
        prompt_scores, prompt_values = self._prompts.attend(layer, queries)
        weights = torch.cat([scores, prompt_scores], dim=-1).softmax(dim=-1)
        mixed = torch.bmm(weights[:, :, :filled], values)
        return mixed.addcmul_(weights[:, :, filled:], prompt_values).view(num_rows, sizes.query)


class _SharedPrompts:
    """Prompts that rows under way attend to without holding copies.

    Attention is computed on a grid: for each prompt as many places as its largest group has rows left.
    """

    def __init__(self, decoder: FusedDecoder) -> None:
        self._decoder, self._sizes = decoder, decoder.sizes
        self._of_row = np.zeros(0, dtype=np.int64)
        """Which prompt each row belongs to."""
        self._lengths = np.zeros(0, dtype=np.int64)
        self._layers: list[Tensor] = []
        """Of each layer [keys and values, prompts x heads, width, head]."""
        self._mask: Tensor | None = None
        self._rows_on_grid = self._places = torch.zeros(0)

    def join(self, read: ReadPrompts, times: Sequence[int]) -> None:
        """Take up prompts and the rows that join with them; drop prompts without rows."""
        used, of_row = np.unique(self._of_row, return_inverse=True)
        self._lengths = np.append(self._lengths[used], read.lengths)
        width, num_kept = int(self._lengths.max()), len(used)
        sizes = self._sizes
        shape = (2, len(self._lengths), sizes.num_key_value_heads, width, sizes.head_size)
        for layer in range(self._decoder.num_layers):
            new = read.caches.pop(0)
            if num_kept == 0 and new.shape[3] == width:
                prompts = new
            else:
                prompts = torch.zeros(shape, dtype=new.dtype, device=new.device)
                prompts[:, num_kept:, :, width - new.shape[3] :] = new
            if num_kept:
                old = self._layers[layer]
                old = old.view(2, -1, sizes.num_key_value_heads, old.shape[2], sizes.head_size)
                kept = min(width, old.shape[3])
                prompts[:, :num_kept, :, width - kept :] = old[:, torch.from_numpy(used), :, -kept:]
            self._layers[layer : layer + 1] = [prompts.flatten(1, 2)]
        self._mask = _mask_left_of(width - self._lengths, width, self._decoder)
        joining = np.repeat(np.arange(num_kept, len(self._lengths)), times)
        self._seat(np.append(of_row, joining).astype(np.int64))

    def move(self, freed: Int[np.ndarray, "moved"], moving: Int[np.ndarray, "moved"], num_left: int) -> None:
        """Follow rows to other seats."""
        self._of_row[freed] = self._of_row[moving]
        self._seat(self._of_row[:num_left])

    def attend(
        self, layer: int, queries: Float[Tensor, "rows_and_heads shared head"]
    ) -> tuple[Float[Tensor, "rows_and_heads shared 1"], Float[Tensor, "rows_and_heads shared head"]]:
        """Give each row's prompt as one key: its score, and its value."""
        head_size, cache = self._sizes.head_size, self._layers[layer]
        on_grid = queries.view(-1, head_size).index_select(0, self._rows_on_grid)
        scores = _scores(on_grid.view(cache.shape[1], -1, head_size), cache[0], self._mask)
        largest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        values = torch.bmm(weights, cache[1]).div_(total).view(-1, head_size).index_select(0, self._places)
        logarithms = total.log_().add_(largest).view(-1).index_select(0, self._places)
        return logarithms.view(*queries.shape[:2], 1), values.view(queries.shape)

    def _seat(self, of_row: Int[np.ndarray, "rows"]) -> None:
        """Lay out the grid: [prompts, heads, places, queries that share a key]."""
        self._of_row = of_row
        heads, shared = self._sizes.num_key_value_heads, self._sizes.heads_per_key
        num_prompts, num_rows = len(self._lengths), len(of_row)
        order = np.argsort(of_row, kind="stable")
        counts = np.bincount(of_row, minlength=num_prompts)
        place_of_row = np.empty(num_rows, dtype=np.int64)
        place_of_row[order] = np.arange(num_rows) - np.repeat(counts.cumsum() - counts, counts)
        num_places = int(counts.max(initial=0))
        row = np.arange(num_rows)[:, None, None]
        head, query = np.arange(heads)[:, None], np.arange(shared)
        of_queries = (
            (of_row[:, None, None] * heads + head) * num_places + place_of_row[:, None, None]
        ) * shared
        places = (of_queries + query).ravel()
        # Places without a row repeat the first row's queries; nobody reads what comes of them.
        rows_on_grid = np.zeros(num_prompts * heads * num_places * shared, dtype=np.int64)
        rows_on_grid[places] = ((row * heads + head) * shared + query).ravel()
        self._rows_on_grid = torch.from_numpy(rows_on_grid).to(self._decoder.device)
        self._places = torch.from_numpy(places).to(self._decoder.device)


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
    logits = decoder.logits(token_ids, positions, attention, torch.from_numpy(last).to(device))
    return ReadPrompts(caches, lengths, logits)


def _scores(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.bmm(queries, keys.transpose(1, 2))
    return torch.baddbmm(mask, queries, keys.transpose(1, 2))


def _mask_left_of(
    starts: Int[np.ndarray, "rows"], num_columns: int, decoder: FusedDecoder
) -> Float[Tensor, "rows_and_heads 1 columns"] | None:
    """Hide the columns before each row's first from all its heads."""
    if not starts.any():
        return None
    is_hidden = np.arange(num_columns) < starts.repeat(decoder.sizes.num_key_value_heads)[:, None, None]
    mask = torch.zeros(is_hidden.shape, dtype=decoder.dtype)
    return mask.masked_fill_(torch.from_numpy(is_hidden), -math.inf).to(decoder.device)
