"""A policy and questions small enough to be made anew in every test; nothing is downloaded."""

from __future__ import annotations

from dteframe.contracts import Policy
from dteframe.models.architectures import Architecture, Sizes, default_intermediate_size, untrained_module
from dteframe.models.characters import character_tokenizer
from dteframe.records import Question


def tiny_policy(
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    num_key_value_heads: int | None = None,
    architecture: Architecture = "qwen2",
    seed: int = 0,
) -> Policy:
    """Make a policy with random float32 weights on the CPU and a tokenizer of single characters.

    Args:
        hidden_size: a multiple of twice ``num_heads``.
        num_layers: blocks of attention and feed-forward network.
        num_heads: attention heads.
        num_key_value_heads: None for as many as ``num_heads``; fewer share keys and values.
        architecture: the class that transformers has for it.
        seed: the same seed gives the same weights.
    """
    tokenizer = character_tokenizer(())
    sizes = Sizes(
        hidden_size=hidden_size,
        intermediate_size=default_intermediate_size(hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        max_position_embeddings=512,
    )
    return Policy(untrained_module(architecture, sizes, tokenizer, seed), tokenizer, "cpu")


def tiny_questions(count: int) -> tuple[Question, ...]:
    """Give ``count`` different sums, of one-digit numbers up to 100 of them, with worked solutions.

    >>> tiny_questions(24)[23].text
    '3+2='
    """
    return tuple(_sum_question(index) for index in range(count))


def _sum_question(index: int) -> Question:
    first, second = index % 10 + index // 100 * 10, index // 10 % 10
    answer = str(first + second)
    text = f"{first}+{second}="
    return Question(id=f"sum-{index:03d}", text=text, prompt=text, answer=answer, solution=answer)
