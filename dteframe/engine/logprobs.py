"""Log-probs and entropies of given completions: no logits outside completions, nor all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dteframe.engine.micro_batches import MicroBatch
from dteframe.engine.shared_attention import NO_MASK, SharedPrompts, let_share_prompts, takes_shared_prompts
from dteframe.memory import LOGITS_OF_A_CHUNK


class ScorerInputs(NamedTuple):
    """A micro-batch as ``CompletionScorer`` takes it."""

    token_ids: torch.Tensor
    """[lines, positions], filled up on the right; one line where rows are laid end to end."""
    positions: torch.Tensor
    """[lines, positions]: where in its own row a token stands, 0, 1, 2, ..."""
    sources: torch.Tensor
    """[tokens]: for each completion token the place, lines laid end to end, that predicts it."""
    targets: torch.Tensor
    """[tokens]: the completion tokens, row after row."""
    shared: SharedPrompts | None
    """What attention has to know where rows are laid end to end."""


def scorer_inputs(micro_batch: MicroBatch, pad_token_id: int, device: str) -> ScorerInputs:
    """Lay rows out as the micro-batch says.

    No rows become one token that nobody asks about: a process without rows of its own runs it so that all
    processes meet in the same collectives, and its gradient is zero.
    """
    num_lines, length = micro_batch.shape
    token_ids = np.full(num_lines * length, pad_token_id, dtype=np.int64)
    positions = np.tile(np.arange(length), num_lines)
    sources, targets = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for place in micro_batch.places:
        prompt_length = len(place.prompt_token_ids)
        middle = place.start + prompt_length
        token_ids[place.start : middle] = place.prompt_token_ids
        positions[place.start : middle] = np.arange(prompt_length)
        for row, start in zip(place.rows, place.completion_starts, strict=True):
            end = start + len(row.completion.token_ids)
            token_ids[start:end] = row.completion.token_ids
            positions[start:end] = prompt_length + np.arange(end - start)
            sources.append(np.arange(start - 1, end - 1))
            sources[-1][:1] = middle - 1
            targets.append(token_ids[start:end])
    shape = (num_lines, length)
    arrays = (token_ids.reshape(shape), positions.reshape(shape), *map(np.concatenate, (sources, targets)))
    tensors: list[Any] = [torch.from_numpy(array).to(device) for array in arrays]
    shared = SharedPrompts.of(micro_batch.places, device) if micro_batch.shares_prompts else None
    return ScorerInputs._make([*tensors, shared])


class CompletionScorer(torch.nn.Module):
    """Gives log-probs and entropies of completions under one module, at the sampling temperature.

    It is a module, the policy's with a last layer of its own, so that FSDP2 can shard it as the root: all
    that reads the head or the embeddings happens inside ``forward``.
    """

    def __init__(
        self, module: PreTrainedModel, temperature: float, *, has_plain_head: bool | None = None
    ) -> None:
        """Find out whether the module's logits are its head's output alone.

        Some architectures scale or cap the logits after the head; for them the module's own forward pass is
        used, which keeps the logits of all positions in memory.

        Args:
            module: a causal language model.
            temperature: logits are divided by it.
            has_plain_head: what another process found out, for a module without weights yet.
        """
        super().__init__()
        self.module = module
        if takes_shared_prompts(module):
            let_share_prompts(module)
        self._temperature = temperature
        self.has_plain_head = self._head_gives_the_logits() if has_plain_head is None else has_plain_head

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Divide logits by another temperature for a while."""
        usual, self._temperature = self._temperature, temperature
        try:
            yield
        finally:
            self._temperature = usual

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
        shared: SharedPrompts | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the completion tokens, laid end to end; the arguments are those of ``ScorerInputs``.

        Returns:
            Log-probs [tokens], nats, float32, with the gradient unless it is switched off; and entropies
            [tokens] of the distributions that the tokens are from, nats, float32, without gradient.
        """
        run = self._decoder if self.has_plain_head else self.module
        # Lines are filled up on the right, where causal attention never looks: they take no mask, which would
        # be kept, and keep a GPU from its fastest attention.
        told: dict[str, Any] = {}
        if shared is not None:
            # The type is asked for here, where FSDP2 has gathered the parameters in the one it computes in.
            dtype = cast(torch.Tensor, self.module.get_input_embeddings().weight).dtype
            config = self.module.config
            together = config.num_attention_heads // config.num_key_value_heads
            told = {"shared": shared.with_masks_for(together, dtype), "attention_mask": NO_MASK}
        results = run(input_ids=token_ids, position_ids=positions, use_cache=False, **told)
        outputs: torch.Tensor = results.last_hidden_state if self.has_plain_head else results.logits
        outputs = outputs.flatten(0, 1)[sources]
        if self.has_plain_head and type(self._head) is torch.nn.Linear:
            return linear_logprobs(outputs, self._head.weight, self._head.bias, targets, self._temperature)
        return self._in_pieces(outputs, targets)

    # Properties, because a module's attribute would list the same parameters under a second name.

    @property
    def _decoder(self) -> torch.nn.Module:
        decoder: torch.nn.Module = self.module.get_decoder()  # type: ignore[no-untyped-call]  # transformers'
        return decoder

    @property
    def _head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.module.get_output_embeddings()  # type: ignore[no-untyped-call]  # as above
        return head

    def _in_pieces(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score what is no linear layer's output, so many tokens at a time that their logits fit."""
        size = _tokens_per_chunk(self.module.config.vocab_size)
        if len(targets) <= size:
            return self._piece(outputs, targets)
        pieces = [
            cast(tuple[torch.Tensor, torch.Tensor], checkpoint(self._piece, *piece, use_reentrant=False))
            for piece in zip(torch.split(outputs, size), torch.split(targets, size), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _piece(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits: torch.Tensor = self._head(outputs) if self.has_plain_head else outputs
        table = (logits.float() / self._temperature).log_softmax(-1)
        entropies = -(table.detach().exp() * table.detach()).sum(-1)
        return table.gather(-1, targets[:, None]).squeeze(-1), entropies

    def _head_gives_the_logits(self) -> bool:
        """Compare the module's logits with its head's on a few tokens."""
        was_training = self.module.training
        self.module.train(False)
        vocabulary_size = int(self._head.weight.shape[0])  # type: ignore[index]  # as above
        probe = torch.arange(min(8, vocabulary_size), device=self.module.device)[None]
        with torch.no_grad():
            logits = self.module(input_ids=probe, use_cache=False).logits
            states = self._decoder(input_ids=probe, use_cache=False).last_hidden_state
            is_equal = torch.equal(self._head(states), logits)
        self.module.train(was_training)
        return is_equal


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give log-probs and entropies under ``softmax((hidden @ weight.T + bias) / temperature)``.

    The logits exist for a chunk of tokens at a time, forward and backward. Matrix products are in the dtype
    of ``hidden``, so that a bfloat16 policy gives the logits that it samples from; all else, and the sum of
    the chunks' gradients of ``weight``, is in float32 or better.

    Args:
        hidden: [tokens, hidden size].
        weight: [vocabulary, hidden size].
        bias: [vocabulary].
        targets: [tokens], int64: the tokens whose log-probs are asked for.
        temperature: above 0.

    Returns:
        Log-probs [tokens] and entropies [tokens], nats; the latter without gradient.
    """
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _LinearLogprobs.apply
    return apply(hidden, weight, bias, targets, temperature)


class _LinearLogprobs(torch.autograd.Function):
    """``linear_logprobs``, which computes a chunk's logits again for the gradient.

    A single chunk keeps its probabilities instead: they would be made again before anything else is freed.
    Chunks write into the same memory: on a CPU, fresh memory costs more than what is computed in it.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch types it as a class without the attributes that it is there to take
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, table = _chunk_memory(hidden, weight), _chunk_memory(hidden, weight)
        logprobs = hidden.new_empty(len(targets), dtype=logits.dtype)
        entropies = torch.empty_like(logprobs)
        for chunk in _chunks(len(targets), len(logits)):
            given = _put_logits(logits, hidden[chunk], weight, bias, temperature)
            logs = torch.log_softmax(given, -1, out=table[: len(given)])
            logprobs[chunk] = logs.gather(-1, targets[chunk, None]).squeeze(-1)
            probabilities = torch.exp(logs, out=given)
            entropies[chunk] = logs.mul_(probabilities).sum(-1).neg_()
        kept = logits if len(logits) == len(targets) else None
        ctx.save_for_backward(hidden, weight, bias, targets, kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        probabilities = _chunk_memory(hidden, weight)
        logits = _chunk_memory(hidden, weight) if kept is None else kept
        dtype = logits.dtype
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        # Of a token's logits: (1 at the target - probability) x the gradient / temperature.
        scale = (-gradients[0] / ctx.temperature)[:, None]
        for chunk in _chunks(len(targets), len(logits)):
            if kept is None:
                given = _put_logits(logits, hidden[chunk], weight, bias, ctx.temperature)
                of_logits = torch.softmax(given, -1, out=probabilities[: len(given)]).mul_(scale[chunk])
            else:
                of_logits = torch.mul(kept, scale, out=probabilities)
            of_logits.scatter_add_(-1, targets[chunk, None], -scale[chunk])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            of_logits = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[chunk])
            if of_weight is not None and hidden.dtype == dtype:
                of_weight.addmm_(of_logits.t(), hidden[chunk])
            elif of_weight is not None:
                of_weight += of_logits.t() @ hidden[chunk]
            del of_logits  # In bfloat16 it is a copy, which the next chunk's logits should not meet.
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def _chunk_memory(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Give room for a chunk's logits, not yet written, in float32 or better."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    size = min(len(hidden), _tokens_per_chunk(len(weight)))
    return hidden.new_empty((size, len(weight)), dtype=dtype)


def _put_logits(
    memory: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Write the logits of a chunk over those before; give the part of the memory that they take."""
    logits = memory[: len(hidden)]
    if hidden.dtype != memory.dtype:
        logits.copy_(torch.nn.functional.linear(hidden, weight, bias))
    elif bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
    return logits.div_(temperature)


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_tokens, max(1, size)))


def _tokens_per_chunk(vocabulary_size: int) -> int:
    return max(1, LOGITS_OF_A_CHUNK // vocabulary_size)
