"""Floating-point operations of a model by arithmetic, without torch, and what devices can do of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dteframe.memory import block_parameters
from dteframe.records import ModelSizes

BFLOAT16_PEAKS = (
    (r"B200", 2250e12),
    (r"H200 NVL", 835e12),
    (r"H200|H100 80GB HBM3|GH200", 989.4e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"A10", 125e12),
)
"""Dense bfloat16 operations a second, by words of the name that CUDA gives a device; the first that fits.

Source: NVIDIA's data sheets of each device; where they print the number with sparsity, half of it.
"""


@dataclass(slots=True)
class PassSizes:
    """Rows that were run through a model, as the sums that its operations depend on."""

    num_tokens: int = 0
    """Prompt and completion tokens, padding left out."""
    num_completion_tokens: int = 0
    """Those whose logits were computed."""
    sum_of_squared_lengths: int = 0

    def note(self, lengths: Iterable[tuple[int, int]], shared_beginnings: Iterable[int] = ()) -> None:
        """Add rows: tokens of the whole row and of its completion.

        Args:
            lengths: of every row.
            shared_beginnings: tokens, from the first on, of every row that found them computed already.
        """
        for length, completion_length in lengths:
            self.num_tokens += length
            self.num_completion_tokens += completion_length
            self.sum_of_squared_lengths += length**2
        for length in shared_beginnings:
            self.num_tokens -= length
            self.sum_of_squared_lengths -= length**2

    def add(self, other: PassSizes) -> None:
        """Add another process's rows."""
        self.num_tokens += other.num_tokens
        self.num_completion_tokens += other.num_completion_tokens
        self.sum_of_squared_lengths += other.sum_of_squared_lengths


def forward_flops(sizes: ModelSizes, rows: PassSizes) -> float:
    """Count the operations of a forward pass: two for every weight and token, and attention's.

    Source: PaLM, arXiv:2204.02311, appendix B: 2 N and, for attention, 4 x layers x width x length a token,
        causal or not. N is what a token goes through: the matrices of the blocks, and the head where logits
        are computed; the look-up of embeddings is no product.
    """
    matrices = sizes.num_layers * sum(
        inputs * outputs for inputs, outputs in block_parameters(sizes).values()
    )
    through_blocks = 2.0 * (matrices + sizes.num_adapter_parameters) * rows.num_tokens
    through_head = 2.0 * sizes.vocabulary_size * sizes.hidden_size * rows.num_completion_tokens
    attention = 4.0 * sizes.num_layers * sizes.query_size * rows.sum_of_squared_lengths
    return through_blocks + through_head + attention


def update_flops(sizes: ModelSizes, trained: PassSizes, scored: PassSizes) -> float:
    """Count the operations of an update: three forward passes' worth where there is a gradient, else one.

    With LoRA two: weights that stay need no gradient of their own. What gradient checkpointing computes again
    is no work of the model.

    Source: PaLM, arXiv:2204.02311, appendix B: 6 N a token; two thirds of it are the backward pass.
    """
    passes = 2 if sizes.num_adapter_parameters else 3
    return passes * forward_flops(sizes, trained) + forward_flops(sizes, scored)


def pairs_per_token(sizes: ModelSizes) -> float:
    """Give how many pairs of tokens take attention the time that all else takes for one token.

    An operation of attention is reckoned at twice the time of one of a matrix product: measured on a CPU, 1.0
    times at a hidden size of 128 and 2.1 times at 512.
    """
    matrices = sum(inputs * outputs for inputs, outputs in block_parameters(sizes).values())
    return matrices / (2 * 2 * sizes.query_size)


def peak_flops(device_name: str) -> float | None:
    """Give the dense bfloat16 operations a second of a device, or None if the table lacks it.

    >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("NVIDIA A10G")
    (312000000000000.0, None)
    """
    if "MIG" in device_name:
        return None
    fitting = (peak for name, peak in BFLOAT16_PEAKS if re.search(rf"\b(?:{name})\b", device_name))
    return next(fitting, None)
