"""Untrained language models of known architectures, made from a few sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Architecture: TypeAlias = Literal["qwen2", "llama"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder; names are those of transformers' configurations."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of the first weights."""


def default_intermediate_size(hidden_size: int) -> int:
    """Give 2.75 times the width, rounded to a multiple of 8: Qwen2's and Llama's proportion.

    >>> default_intermediate_size(64)
    176
    """
    return max(8, int(2.75 * hidden_size + 4) // 8 * 8)


def untrained_module(
    architecture: Architecture, sizes: Sizes, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Make a module with random float32 weights on the CPU, in evaluation mode.

    The same arguments give the same weights; torch's own generator is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, module_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=sizes.max_position_embeddings,
        tie_word_embeddings=sizes.tie_word_embeddings,
        initializer_range=sizes.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: PreTrainedModel = module_class(config).float().eval()
    return module
