"""Embed texts with the policy: what it makes of a question before it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from dteframe.contracts import Policy

TEXTS_PER_BATCH = 32


def encode_with(
    policy: Policy, texts: Sequence[str], progress: Callable[[str, int, int], None]
) -> Float[np.ndarray, "texts width"]:
    """Average the policy's last hidden states over each text's tokens, in float32.

    Raises:
        ValueError: the policy is sharded, and this process alone cannot run it.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(next(policy.module.parameters()), DTensor):
        raise ValueError(
            "encode_with_policy: the policy is spread over the processes by now and cannot embed in one of "
            "them; embed in start()"
        )
    rows = []
    policy.module.eval()  # type: ignore[no-untyped-call]  # transformers wraps it untyped
    with torch.no_grad():
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            some = list(texts[start : start + TEXTS_PER_BATCH])
            # On the right: positions then begin at the text, for models that learn them too.
            batch = policy.tokenizer(some, return_tensors="pt", padding=True, padding_side="right")
            inputs = {name: batch[name].to(policy.device) for name in ("input_ids", "attention_mask")}
            states = policy.module(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
            rows.append(mean.cpu().numpy())
            progress(
                "embedding questions with the policy", min(start + TEXTS_PER_BATCH, len(texts)), len(texts)
            )
    return np.concatenate(rows) if rows else np.zeros((0, policy.module.config.hidden_size), np.float32)
