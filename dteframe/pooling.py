"""From the hidden states of a text's tokens to one embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float, Int

if TYPE_CHECKING:
    import torch


def pool_states(
    states: Float[torch.Tensor, "texts tokens width"],
    attention_mask: Int[torch.Tensor, "texts tokens"],
    num_suffix_tokens: int,
) -> Float[torch.Tensor, "texts embedding"]:
    """Average the states of each text's tokens, and put the suffix's last one beside; in float32.

    Args:
        states: of texts that are padded on the right.
        attention_mask: 0 where there is padding.
        num_suffix_tokens: how many stand behind each text. The mean leaves them out, and the state of the
            last of them stands beside it; 0: the mean alone.

    Returns:
        Embeddings of the states' width, or of twice that with a suffix.
    """
    import torch

    lengths = attention_mask.sum(1, keepdim=True)
    places = torch.arange(states.shape[1], device=states.device)
    is_text = (places < lengths - num_suffix_tokens).unsqueeze(-1)
    mean = (states.float() * is_text).sum(1) / is_text.sum(1).clamp(min=1)
    if not num_suffix_tokens:
        return mean
    rows = torch.arange(len(states), device=states.device)
    return torch.cat([mean, states[rows, lengths[:, 0] - 1].float()], dim=1)
