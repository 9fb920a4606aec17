"""Supervised steps on worked solutions: what a model made from scratch needs before it can be rewarded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, Field

from dteframe.contracts import PluginConfig
from dteframe.records import Question

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that are not learnt; cross-entropy's default."""

STEPS_OF_FINAL_LOSS = 20
"""The loss that is told at the end is the mean over so many steps: one batch alone is noisy."""


class WarmUpConfig(BaseModel):
    """Options of the supervised steps before training."""

    model_config = PluginConfig.model_config

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 is no warm-up."""
    batch_size: int = Field(default=64, ge=1)
    """Worked solutions per step, drawn in epochs without replacement."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """The highest of the schedule."""
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """What follows the linear warm-up of the learning rate: a cosine down to 0, or no change."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's, on every parameter."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are shortened to this norm."""


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A prompt followed by what is to be learnt."""

    token_ids: Int[np.ndarray, "tokens"]
    """Prompt, solution and end token."""
    num_prompt_tokens: int


def worked_examples(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, warn: Callable[[str], None]
) -> list[WorkedExample]:
    """Tokenise the questions that have a worked solution and fit the model; warn of those that do not.

    Raises:
        ValueError: no question has a worked solution, or none fits.
    """
    with_solution = [question for question in questions if question.solution is not None]
    if not with_solution:
        raise ValueError(
            f"model 'from_scratch': none of the {len(questions)} training questions has a worked solution to "
            "warm up on; set model.warm_up.steps=0 or choose a dataset with solutions"
        )
    examples = [_worked_example(question, tokenizer) for question in with_solution]
    fitting = [example for example in examples if len(example.token_ids) <= tokenizer.model_max_length]
    if not fitting:
        raise ValueError(
            f"model 'from_scratch': all {len(examples)} worked solutions are longer than the "
            f"{tokenizer.model_max_length} tokens that the model reads; raise model.max_position_embeddings"
        )
    if len(fitting) < len(examples):
        warn(
            f"model 'from_scratch': {len(examples) - len(fitting)} of {len(examples)} worked solutions are "
            f"longer than the {tokenizer.model_max_length} tokens that the model reads; they are left out of "
            "the warm-up; raise model.max_position_embeddings"
        )
    return fitting


def warm_up(
    module: PreTrainedModel,
    examples: Sequence[WorkedExample],
    config: WarmUpConfig,
    seed: int,
    progress: Callable[[str, int, int], None],
    computes_in: Literal["float32", "bfloat16"] = "float32",
) -> float:
    """Train the module on the examples' solutions, and leave it in evaluation mode.

    Chance comes from ``seed`` alone. The parameters stay as they are: with ``bfloat16`` only the products are
    computed in it, which GPUs do many times faster.

    Returns:
        The loss at the end, in nats per token: the mean over the last steps.

    Raises:
        ValueError: the loss is not finite.
    """
    import torch

    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=config.weight_decay)
    losses: list[float] = []
    module.train()
    for step, batch in zip(range(config.steps), _batches(examples, config.batch_size, rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        with torch.autocast(module.device.type, torch.bfloat16, enabled=computes_in == "bfloat16"):
            loss = solution_loss(module, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"model 'from_scratch': the loss of the warm-up is {losses[-1]} at step {step}; "
                f"lower model.warm_up.learning_rate from {config.learning_rate}"
            )
        progress("warming up", step, config.steps)
    module.zero_grad()
    module.eval()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    return float(np.mean(losses[-STEPS_OF_FINAL_LOSS:]))


def solution_loss(module: PreTrainedModel, examples: Sequence[WorkedExample]) -> Tensor:
    """Give the mean cross-entropy, in nats, over the tokens of the solutions and their end tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    longest = max(len(example.token_ids) for example in examples)
    token_ids = np.zeros((len(examples), longest), dtype=np.int64)
    labels = np.full((len(examples), longest), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        token_ids[row, :length] = example.token_ids
        labels[row, example.num_prompt_tokens : length] = example.token_ids[example.num_prompt_tokens :]
    # Padding is on the right, where causal attention never looks: no mask is needed.
    logits = module(input_ids=torch.from_numpy(token_ids).to(module.device), use_cache=False).logits
    targets = torch.from_numpy(labels[:, 1:]).to(module.device)
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def learning_rate_at(step: int, config: WarmUpConfig) -> float:
    """Rise linearly, then stay or follow a cosine to 0.

    >>> config = WarmUpConfig(steps=4, warmup_steps=2, learning_rate=1.0)
    >>> [round(learning_rate_at(step, config), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _worked_example(question: Question, tokenizer: PreTrainedTokenizerBase) -> WorkedExample:
    """Join prompt, solution and end token, the prompt as the policy will be asked it."""
    prompt = question.prompt
    if not isinstance(prompt, str):
        messages = [dict(message) for message in prompt]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompt_ids = tokenizer(prompt)["input_ids"]
    solution_ids = tokenizer(question.solution, add_special_tokens=False)["input_ids"]
    joined = np.array([*prompt_ids, *solution_ids, tokenizer.eos_token_id], dtype=np.int64)
    return WorkedExample(joined, len(prompt_ids))


def _batches(
    examples: Sequence[WorkedExample], batch_size: int, rng: np.random.Generator
) -> Iterator[list[WorkedExample]]:
    """Go through the examples in a new order each time, for ever."""
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting.extend(rng.permutation(len(examples)).tolist())
        yield [examples[index] for index in waiting[:batch_size]]
        del waiting[:batch_size]
