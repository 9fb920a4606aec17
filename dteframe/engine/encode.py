"""Embed texts with the policy: what it makes of a question before it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dteframe.pooling import pool_states

if TYPE_CHECKING:
    from dteframe.contracts import Policy

TOKENS_PER_BATCH = 8192
"""Padding included: what a few hundred short questions or a few long ones come to."""


def encode_with(
    policy: Policy,
    progress: Callable[[str, int, int], None],
    texts: Sequence[str],
    *,
    layer: int | None = None,
    suffix: str | None = None,
) -> Float[np.ndarray, "texts width"]:
    """Embed texts as ``PolicyEncoder`` says.

    Raises:
        ValueError: the policy is sharded, and this process alone cannot run it, it has no such earlier layer,
            or the suffix has no tokens.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(next(policy.module.parameters()), DTensor):
        raise ValueError(
            "encode_with_policy: the policy is spread over the processes by now and cannot embed in one of "
            "them; embed in start()"
        )
    num_layers = policy.module.config.num_hidden_layers
    if layer is not None and layer >= num_layers:
        raise ValueError(
            f"encode_with_policy: layer is {layer}, the policy has {num_layers} layers; lower "
            "estimator.embeddings.layer, or leave it out for the last"
        )
    suffix_ids = policy.tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    if suffix and not suffix_ids:
        raise ValueError(
            f"encode_with_policy: the tokenizer gives no token for the suffix {suffix!r}; change it"
        )
    encoded = [row + suffix_ids for row in policy.tokenizer(list(texts))["input_ids"]] if texts else []
    width = policy.module.config.hidden_size
    embeddings = np.zeros((len(texts), 2 * width if suffix_ids else width), np.float32)
    num_done = 0
    policy.module.eval()  # type: ignore[no-untyped-call]  # transformers wraps it untyped
    with torch.no_grad():
        for positions in _batches([len(token_ids) for token_ids in encoded]):
            # On the right: positions then begin at the text, for models that learn them too.
            some = {"input_ids": [encoded[position] for position in positions]}
            batch = policy.tokenizer.pad(some, return_tensors="pt", padding_side="right")
            inputs = {name: batch[name].to(policy.device) for name in ("input_ids", "attention_mask")}
            layers = policy.module(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
            states = layers[-1 if layer is None else layer]
            pooled = pool_states(states, inputs["attention_mask"], len(suffix_ids))
            embeddings[positions] = pooled.cpu().numpy()
            num_done += len(positions)
            progress("embedding questions with the policy", num_done, len(texts))
    return embeddings


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Divide texts into batches of alike lengths: their positions, the shortest texts first."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[position] > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
