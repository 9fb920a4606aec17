"""The decode loop: from prompts to sampled tokens and their log-probs, on a module of transformers.

Every row has its own column of uniform numbers, one per token. So a row's tokens depend on its prompt and its
numbers alone: rows that finish and leave, or another number of rows at once, change nothing but rounding.
This module imports torch and is itself imported only when something is sampled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from dteframe.records import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_FINISHED_FRACTION = 0.125
"""Rows leave once more than this fraction of them has finished: moving the cache costs about one step."""
CHUNK_TOKENS = 512
"""Tokens of a large vocabulary that are summed together."""
CHUNKED_FROM_TOKENS = 4096
"""Larger vocabularies are searched chunk by chunk; smaller ones in one go, which is fewer operations."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prompts that the module has read, once each."""

    cache: DynamicCache
    """Keys and values; prompts are padded on the left."""
    logits: Float[Tensor, "prompts vocabulary"]
    """Of the token after the prompt."""
    is_token: Bool[Tensor, "prompts width"]
    """False where a prompt is padded."""

    def repeated_cache(self, times: int) -> DynamicCache:
        """Give a cache with ``times`` rows for every prompt, and leave this one as it is."""
        repeated = copy.copy(self.cache)
        repeated.layers = [copy.copy(layer) for layer in self.cache.layers]
        repeated.batch_repeat_interleave(times)
        return repeated


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was sampled: rows in the order prompt by prompt, the completions of a prompt side by side."""

    token_ids: Int[np.ndarray, "rows longest"]
    """Meaningless from ``lengths`` on."""
    logprobs: Float[np.ndarray, "rows longest"]
    """Nats, of the distribution that was sampled from; meaningless from ``lengths`` on."""
    lengths: Int[np.ndarray, "rows"]
    """Tokens, the end token included; at least 1."""
    has_stopped: Bool[np.ndarray, "rows"]
    """Whether the last token is an end token."""


def read_prompts(module: PreTrainedModel, prompts: Sequence[Int[np.ndarray, "prompt"]]) -> Prefix:
    """Run the module over prompts of at least one token each."""
    width = max(len(prompt) for prompt in prompts)
    token_ids = np.zeros((len(prompts), width), dtype=np.int64)
    is_token = np.zeros((len(prompts), width), dtype=bool)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = prompt
        is_token[row, width - len(prompt) :] = True
    mask = torch.from_numpy(is_token).to(module.device)
    cache = DynamicCache(config=module.config)
    output = module(
        input_ids=torch.from_numpy(token_ids).to(module.device),
        attention_mask=None if is_token.all() else mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(cache, output.logits[:, -1], mask)


def sample_rows(
    module: PreTrainedModel,
    prefix: Prefix,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "rows longest"],
    is_end: Bool[Tensor, "vocabulary"],
) -> SampledRows:
    """Sample completions until each has ended or is as long as ``uniforms`` is wide.

    Args:
        module: in evaluation mode.
        prefix: the prompts that ``module`` has read.
        sampling: temperature and truncation; its length is not read.
        uniforms: float64 in [0, 1); a whole number of rows per prompt, one number per token.
        is_end: which tokens end a completion; on the module's device.
    """
    num_rows, longest = uniforms.shape
    num_prompts, width = prefix.is_token.shape
    times = num_rows // num_prompts
    chance = torch.from_numpy(uniforms).to(module.device)
    cache = prefix.repeated_cache(times)
    logits = prefix.logits.repeat_interleave(times, dim=0)
    positions = prefix.is_token.sum(dim=1).repeat_interleave(times)[:, None]
    mask = None  # Without padding there is nothing to mask, and attention takes its faster way.
    if not prefix.is_token.all():
        prompt_mask = prefix.is_token.repeat_interleave(times, dim=0)
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(num_rows, longest)], dim=1)
    token_ids = torch.zeros(num_rows, longest, dtype=torch.int64, device=module.device)
    logprobs = torch.zeros(num_rows, longest, dtype=torch.float32, device=module.device)
    rows = torch.arange(num_rows, device=module.device)  # Which row of the result each row of the batch is.
    has_ended = torch.zeros(num_rows, dtype=torch.bool, device=module.device)
    for step in range(longest):
        tokens, chosen_logprobs = sample_tokens(logits, chance[rows, step], sampling)
        token_ids[rows, step] = tokens
        logprobs[rows, step] = chosen_logprobs
        has_ended |= is_end[tokens]
        num_ended = int(has_ended.sum())
        if step + 1 == longest or num_ended == len(rows):
            break
        if num_ended > LARGEST_FINISHED_FRACTION * len(rows):
            running = (~has_ended).nonzero()[:, 0]
            cache.batch_select_indices(running)
            tokens, rows, positions = tokens[running], rows[running], positions[running]
            has_ended = has_ended[running]
            mask = None if mask is None else mask[running]
        logits = module(
            input_ids=tokens[:, None],
            attention_mask=None if mask is None else mask[:, : width + step + 1],
            position_ids=positions + step,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return up_to_the_end(token_ids[:, : step + 1], logprobs[:, : step + 1], is_end)


def sample_tokens(
    logits: Float[Tensor, "rows vocabulary"], uniforms: Float[Tensor, "rows"], sampling: Sampling
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Sample one token per row by inverting the cumulative distribution; give its log-prob as well.

    The distribution is summed in float64: in float32 the many unlikely tokens of a large vocabulary would
    get lost beside the likely ones. A token of probability 0 is never sampled. A large vocabulary is searched
    in two levels, chunks and then tokens of one, so that no float64 of its size is ever made.

    Args:
        logits: of any floating type; what follows is float32.
        uniforms: float64 multiples of 2**-53 in [0, 1), as numpy's ``random`` gives.
        sampling: temperature and truncation.
    """
    scores = logits.float()
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    num_rows, vocabulary_size = scores.shape
    highest = scores.amax(dim=-1, keepdim=True)
    is_large = vocabulary_size > CHUNKED_FROM_TOKENS
    padding = -vocabulary_size % CHUNK_TOKENS if is_large else 0
    weights = torch.zeros(num_rows, vocabulary_size + padding, device=scores.device)
    shifted = torch.sub(scores, highest, out=weights[:, :vocabulary_size])
    if sampling.is_truncated:
        shifted.copy_(truncated(shifted, sampling))
    shifted.exp_()
    tokens, total = _sampled_of_chunks(weights, uniforms) if is_large else _sampled(weights, uniforms)
    # Only logits that are not finite lead beyond the last token; the log-prob then shows it.
    tokens = tokens.clamp(max=vocabulary_size - 1)
    logprobs = (scores.gather(1, tokens) - highest).double() - total.log()
    return tokens[:, 0], logprobs[:, 0].float()


def _sampled(
    weights: Float[Tensor, "rows tokens"], uniforms: Float[Tensor, "rows"]
) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Give the token at that share of each row's weights, and the sum of these."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # A product that rounds up to the total would lead beyond the last token that has a weight.
    targets = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True), total


def _sampled_of_chunks(
    weights: Float[Tensor, "rows tokens"], uniforms: Float[Tensor, "rows"]
) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Do the same by chunks: find the chunk by their sums, then the token by the share of it that is left.

    A chunk is summed in float32, in pairs and relative to itself, so that every token's probability is right
    up to the rounding that its own float32 weight has.
    """
    chunks = weights.view(len(weights), -1, CHUNK_TOKENS)
    sums = chunks.sum(dim=-1)
    chunk, total = _sampled(sums, uniforms)
    chunk = chunk.clamp(max=sums.shape[1] - 1)
    before = sums.cumsum(dim=-1, dtype=torch.float64).gather(1, chunk) - sums.gather(1, chunk)
    shares = (uniforms[:, None] * total - before) / sums.gather(1, chunk)
    rows = torch.arange(len(weights), device=weights.device)
    token, _ = _sampled(chunks[rows, chunk[:, 0]], shares[:, 0].clamp(0, 1))
    return chunk * CHUNK_TOKENS + token, total


def truncated(
    scores: Float[Tensor, "rows vocabulary"], sampling: Sampling
) -> Float[Tensor, "rows vocabulary"]:
    """Put -inf where a token cannot be sampled: top_k first, then top_p, then min_p, as transformers does.

    Tokens as likely as the k-th all stay. At least the likeliest token stays.

    Args:
        scores: log-probs up to a constant per row; the largest is 0.
        sampling: what truncates.
    """
    if sampling.top_k:
        kth = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort(dim=-1)
        is_left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        is_left_out[:, -1] = False
        scores = scores.masked_fill(is_left_out.scatter(1, order, is_left_out), -math.inf)
    if sampling.min_p:
        scores = scores.masked_fill(scores.exp() < sampling.min_p, -math.inf)
    return scores


def up_to_the_end(
    token_ids: Int[Tensor, "rows longest"],
    logprobs: Float[Tensor, "rows longest"],
    is_end: Bool[Tensor, "vocabulary"],
) -> SampledRows:
    """Find where each row ends: rows may go on after their end token until they leave."""
    ends = is_end[token_ids].cpu().numpy()
    has_stopped = np.any(ends, axis=1)
    lengths = np.where(has_stopped, ends.argmax(axis=1) + 1, ends.shape[1])
    return SampledRows(token_ids.cpu().numpy(), logprobs.cpu().numpy(), lengths, has_stopped)
