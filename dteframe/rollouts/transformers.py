"""Rollouts sampled by the module in training itself, with a decode loop of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, final

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from dteframe import (
    BatchArithmetic,
    Completion,
    Component,
    ModelSizes,
    Policy,
    Prompt,
    Rollout,
    RolloutConfig,
    Sampling,
    SamplingMemory,
    hookimpl,
)
from dteframe.memory import sampling_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dteframe.rollouts.decode import SampledRows


class TransformersRolloutConfig(RolloutConfig):
    """Options of the rollouts by transformers."""

    type: Literal["transformers"] = "transformers"
    max_batch_rows: int = Field(default=256, ge=1)
    """Completions under way at once, which bounds the memory for keys and values; the rest wait until some
    have ended. Does not change what is sampled, up to rounding."""
    canary_every: int = Field(default=0, ge=0)
    """As in every rollout; 0 because the weights are the trainer's own."""

    def memory(
        self, sizes: ModelSizes, arithmetic: BatchArithmetic, num_processes: int, device_bytes: int | None
    ) -> SamplingMemory:
        """Count what the decode loop takes for the largest batch of completions of full length."""
        generations = arithmetic.num_generations
        asked_at_once = max(arithmetic.questions_per_step, arithmetic.reference_size)
        num_prompts = min(max(1, self.max_batch_rows // generations), -(-asked_at_once // num_processes))
        num_rows = min(num_prompts * generations, max(self.max_batch_rows, num_prompts))
        num_completions = -(-asked_at_once * generations // num_processes)
        lengths = arithmetic.max_prompt_length, arithmetic.max_completion_length
        return SamplingMemory(
            sampling_bytes(sizes, num_prompts, num_rows, num_completions, lengths),
            remark=f"sampling holds {num_rows} completions of full length at a time (rollout.max_batch_rows)",
        )


@final
class TransformersRollout(Rollout):
    """Sample with the weights of the module that is being trained, as they are: nothing to sync.

    A prompt is read once for all its completions; completions that have ended make room for waiting ones. A
    completion stops at the tokenizer's end token or at any of the generation configuration's. Modules like
    Qwen2, Llama and Mistral are sampled by a fused decoder made from their weights, others by themselves.
    """

    config: TransformersRolloutConfig
    shares_module = True

    def start(self, policy: Policy) -> None:
        """Take the policy and find the tokens that end a completion."""
        self._policy = policy
        self._end_token_ids = end_token_ids(policy.module, policy.tokenizer)
        self._has_said_that_it_is_slower = False

    def sync(self, policy: Policy) -> None:
        """Take the policy, whose module may be another object; its weights are shared."""
        self._policy = policy

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Sample completions; prompts of like length are decoded together."""
        from dteframe.rollouts.fused_decoder import refusal

        if not prompts:
            return
        module = self._policy.module
        self._check_lengths(prompts, sampling)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
        in_order = [prompts[index] for index in order]
        seeds_in_order = [seeds[index] for index in order]
        reason = refusal(module)
        if reason is None:
            answers = self._answer_fused(in_order, num_generations, sampling, seeds_in_order)
        else:
            self._say_once_that_it_is_slower(reason)
            answers = self._answer_in_batches(in_order, num_generations, sampling, seeds_in_order)
        for place, completions in _evaluating(module, answers):
            yield order[place], completions

    def _answer_fused(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Sample with a decoder made for this call from the module's weights."""
        from dteframe.rollouts.continuous import Seats, sample_continuously, shares_prompts
        from dteframe.rollouts.fused_decoder import FusedDecoder

        token_ids = [prompt.token_ids for prompt in prompts]
        longest_prompt = max(len(prompt) for prompt in token_ids)
        decoder = FusedDecoder(self._policy.module, longest_prompt + sampling.max_completion_length)
        is_end = self._is_end(decoder.vocabulary_size)
        uniforms = uniforms_of(seeds, num_generations, sampling)
        ended = sample_continuously(
            Seats(decoder, sampling, is_end, uniforms, shares_prompts=shares_prompts(decoder, token_ids)),
            token_ids,
            self.config.max_batch_rows,
            lambda done, total: self.context.progress("generating", done, total),
        )
        for places, rows in ended:
            at_once = [prompts[place] for place in places]
            yield from zip(places, self._grouped(rows, at_once, num_generations), strict=True)

    def _answer_in_batches(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Sample with the module itself, batch after batch."""
        from dteframe.rollouts.decode import read_prompts, sample_rows

        module, max_rows = self._policy.module, self.config.max_batch_rows
        prompts_at_once = max(1, max_rows // max(1, num_generations))
        for first_prompt in range(0, len(prompts), prompts_at_once):
            batch = prompts[first_prompt : first_prompt + prompts_at_once]
            prefix = read_prompts(module, [prompt.token_ids for prompt in batch])
            is_end = self._is_end(prefix.logits.shape[-1])
            uniforms = uniforms_of(seeds[first_prompt : first_prompt + len(batch)], num_generations, sampling)
            in_batch: list[list[Completion]] = [[] for _ in batch]
            for first in range(0, num_generations, max_rows):
                part = uniforms[:, first : first + max_rows]
                rows = sample_rows(module, prefix, sampling, part.reshape(-1, part.shape[-1]), is_end)
                for group, more in zip(in_batch, self._grouped(rows, batch, part.shape[1]), strict=True):
                    group += more
            yield from enumerate(in_batch, start=first_prompt)
            if len(prompts) > prompts_at_once:
                num_answered = first_prompt + len(batch)
                self.context.progress(
                    "generating", num_answered * num_generations, len(prompts) * num_generations
                )

    def _is_end(self, vocabulary_size: int) -> Bool[torch.Tensor, "vocabulary"]:
        """Mark the tokens that end a completion."""
        import torch

        is_end = torch.zeros(vocabulary_size, dtype=torch.bool, device=self._policy.module.device)
        is_end[self._end_token_ids] = True
        return is_end

    def _say_once_that_it_is_slower(self, reason: str) -> None:
        if not self._has_said_that_it_is_slower:
            self._has_said_that_it_is_slower = True
            self.context.warn(
                f"rollout 'transformers': the fused decoder cannot stand for the model, because {reason}; "
                "the module itself samples, which is right but slower"
            )

    def _grouped(
        self, rows: SampledRows, prompts: Sequence[Prompt], rows_per_prompt: int
    ) -> list[list[Completion]]:
        """Give the completions of each prompt."""
        flat = list(self._completions(rows, prompts, rows_per_prompt))
        return [flat[at * rows_per_prompt : (at + 1) * rows_per_prompt] for at in range(len(prompts))]

    def _completions(
        self, rows: SampledRows, prompts: Sequence[Prompt], rows_per_prompt: int
    ) -> Iterator[Completion]:
        """Cut the rows at their ends and decode them all at once."""
        longest = np.arange(rows.logprobs.shape[1])
        is_broken = (~np.isfinite(rows.logprobs) & (longest < rows.lengths[:, None])).any(axis=1)
        if is_broken.any():
            broken = prompts[int(is_broken.argmax()) // rows_per_prompt].question_id
            raise ValueError(
                f"rollout 'transformers': the policy's logits for question {broken!r} are not finite; "
                "its weights have diverged: lower training.learning_rate, or resume from an earlier "
                "checkpoint"
            )
        cut = [row[:length] for row, length in zip(rows.token_ids, rows.lengths, strict=True)]
        texts = self._policy.tokenizer.batch_decode(cut, skip_special_tokens=True)
        for index, (token_ids, text) in enumerate(zip(cut, texts, strict=True)):
            yield Completion(
                token_ids=token_ids.copy(),
                behaviour_logprobs=rows.logprobs[index, : len(token_ids)].copy(),
                finish_reason="stop" if rows.has_stopped[index] else "length",
                text=text,
            )

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Refuse what the module cannot read."""
        longest = getattr(self._policy.module.config, "max_position_embeddings", None)
        for prompt in prompts:
            num_tokens = len(prompt.token_ids)
            if num_tokens == 0:
                raise ValueError(
                    f"rollout 'transformers': the prompt of question {prompt.question_id!r} has no tokens; "
                    "it must have one at least"
                )
            if longest is not None and num_tokens + sampling.max_completion_length > longest:
                raise ValueError(
                    f"rollout 'transformers': the prompt of question {prompt.question_id!r} has "
                    f"{num_tokens} tokens and completions have up to {sampling.max_completion_length}, but "
                    f"the model reads {longest}; lower training.max_prompt_length or "
                    "rollout.max_completion_length"
                )


def end_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end a completion: the generation configuration's and the tokenizer's."""
    configured = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if not ids:
        raise ValueError(
            "rollout 'transformers': neither the tokenizer nor the generation configuration has an "
            "end-of-sequence token; set eos_token in the model's tokenizer_config.json"
        )
    return sorted(ids)


def uniforms_of(
    seeds: Sequence[int], num_generations: int, sampling: Sampling
) -> Float[np.ndarray, "prompts generations longest"]:
    """Give every prompt the numbers that its completions are sampled with: they depend on its seed alone."""
    shape = (num_generations, sampling.max_completion_length)
    return np.stack([np.random.default_rng(seed).random(shape) for seed in seeds])


def _evaluating(
    module: PreTrainedModel, answers: Iterator[tuple[int, list[Completion]]]
) -> Iterator[tuple[int, list[Completion]]]:
    """Take answers in evaluation mode and without gradients, and give each in the modes of before.

    Not ``inference_mode``: what a module keeps from it (rotary tables, gathered shards) breaks training.
    """
    import torch

    while True:
        was_training = module.training
        if was_training:  # Setting a mode visits every module, which costs as much as a short answer.
            module.eval()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        try:
            with torch.no_grad():
                answer = next(answers, None)
        finally:
            if was_training:
                module.train()
        if answer is None:
            return
        yield answer


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this file."""
    return [TransformersRollout]
