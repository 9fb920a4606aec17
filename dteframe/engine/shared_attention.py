"""Attention of rows that are laid end to end and share prompts: exact, tile by tile.

The module is one of transformers'. Its attention is looked up by a name in its configuration, and ours stands
under a name of its own; without ``SharedPrompts`` it is transformers' ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dteframe.engine.tiles import Place, Tile, tiles_of
from dteframe.models.stored_sizes import sees_all_before

NAME = "dteframe_shared_prompts"
"""What the attention is called in a module's configuration, while it is loaded; it is not saved."""
MASK_ALIGNMENT = 16
"""A GPU's attention copies a mask, in every layer, unless its rows are so many numbers apart or multiples."""
NO_MASK = torch.empty(1, 1, 0, 0)
"""Four dimensions: transformers hands such a mask on as it is, where it would make one of the positions."""


@dataclass(frozen=True, slots=True)
class TileTensors:
    """One call of attention."""

    asking: torch.Tensor
    """[stretches, asking]: places of the tokens whose queries are taken."""
    keys: torch.Tensor
    """[stretches, positions]: places of those whose keys and values are taken."""
    mask: torch.Tensor | None
    """[1 or stretches, 1, asking, positions]: who sees whom; None for all that stands before."""

    @classmethod
    def of(cls, tile: Tile, device: str) -> Self:
        """Give what a tile asks of attention."""
        keys, seen = torch.from_numpy(tile.places()).to(device), tile.seen()
        mask = None if seen is None else torch.from_numpy(seen).to(device)[:, None]
        return cls(keys[:, tile.context_length :], keys, mask)


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """How attention is cut into calls, and put together again."""

    tiles: tuple[TileTensors, ...]
    results: torch.Tensor
    """[tokens]: where each token's result stands, those of all tiles laid end to end."""

    @classmethod
    def of(cls, places: Sequence[Place], device: str) -> Self:
        """Cut the attention of rows that are laid end to end."""
        tiles = tiles_of(places)
        firsts = np.cumsum([0, *(len(tile.stretches) * tile.length for tile in tiles)])
        answers = [tile.answers() + [[0], [first]] for tile, first in zip(tiles, firsts, strict=False)]
        tokens, positions = np.concatenate(answers, axis=1)
        results = np.empty(places[-1].end, dtype=np.int64)
        results[tokens] = positions
        tensors = tuple(TileTensors.of(tile, device) for tile in tiles)
        return cls(tensors, torch.from_numpy(results).to(device))

    def with_masks_for(self, num_queries_a_key: int, dtype: torch.dtype) -> SharedPrompts:
        """Make masks what attention adds to its scores: of others SDPA makes and keeps such in every layer.

        Args:
            num_queries_a_key: heads of queries that share one of keys: they ask one after the other.
            dtype: the queries'.
        """
        tiles = [
            tile if tile.mask is None else replace(tile, mask=_added(tile.mask, num_queries_a_key, dtype))
            for tile in self.tiles
        ]
        return replace(self, tiles=tuple(tiles))


def takes_shared_prompts(module: PreTrainedModel) -> bool:
    """Whether rows that are laid end to end, kept apart by attention, are computed as they are alone."""
    config = module.config
    return config._attn_implementation in ("sdpa", NAME) and sees_all_before(config.to_dict())


def let_share_prompts(module: PreTrainedModel) -> None:
    """Give a module that takes shared prompts the attention that knows of them."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module.set_attn_implementation(NAME)


def attend(  # noqa: PLR0913  # transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared: SharedPrompts | None = None,
    **others: Any,  # what transformers hands to every attention
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers asks for it: [lines, heads, positions, head size] in, heads third."""
    if shared is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    num_heads, num_key_heads, head_size = query.shape[1], key.shape[1], query.shape[3]
    queries, keys, values = (item.transpose(1, 2).flatten(0, 1).flatten(1) for item in (query, key, value))
    found = []
    for tile in shared.tiles:
        num_stretches, num_asking = tile.asking.shape
        asking = _taken(queries, tile.asking)
        key, value = (
            _taken(item, tile.keys).view(num_stretches, -1, num_key_heads, head_size).transpose(1, 2)
            for item in (keys, values)
        )
        if tile.mask is None:
            asking = asking.view(num_stretches, num_asking, num_heads, head_size).transpose(1, 2)
            result = scaled_dot_product_attention(
                asking, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
        else:
            # Queries that share a key stand one after the other: GPUs have no mask for keys that are shared.
            split = (num_stretches, num_asking, num_key_heads, -1, head_size)
            asking = asking.view(split).transpose(1, 2).flatten(2, 3)
            result = scaled_dot_product_attention(
                asking, key, value, attn_mask=tile.mask, dropout_p=dropout, scale=scaling
            )
            result = result.view(num_stretches, num_key_heads, num_asking, -1, head_size).transpose(1, 2)
        found.append(result.reshape(-1, num_heads * head_size))
    return _taken(torch.cat(found), shared.results).view(1, -1, num_heads, head_size), None


def _taken(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take rows of [tokens, features] by their places."""
    apply: Callable[..., torch.Tensor] = _Taken.apply
    return apply(values, places)


class _Taken(torch.autograd.Function):
    """``torch.nn.functional.embedding``, whose gradient is summed in float32, and faster on a CPU."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_tokens = len(values)
        return embedding(places, values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        (gradient,) = gradients
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.num_tokens, gradient.shape[-1]), dtype=dtype)
        total.index_add_(0, places.flatten(), gradient.flatten(0, -2).to(dtype))
        return total.to(gradient.dtype), None


def _added(is_seen: torch.Tensor, num_queries_a_key: int, dtype: torch.dtype) -> torch.Tensor:
    """Give 0 where a token is seen and minus infinity where it is not, rows laid out as GPUs want them."""
    is_seen = is_seen.repeat_interleave(num_queries_a_key, dim=2)
    aligned = -(-is_seen.shape[-1] // MASK_ALIGNMENT) * MASK_ALIGNMENT
    room = torch.full((*is_seen.shape[:-1], aligned), -torch.inf, dtype=dtype, device=is_seen.device)
    return room[..., : is_seen.shape[-1]].masked_fill_(is_seen, 0.0)
