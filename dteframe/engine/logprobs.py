"""Log-probs of given completions under a module: one forward pass, no logits outside completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dteframe.engine.pack import Row

MAX_LOGITS = 2**28
"""Logits that exist at a time (1 GiB in float32); more are done in pieces, and again for the gradient."""


class CompletionScorer:
    """Gives the log-probs of completions under one module, at the sampling temperature."""

    def __init__(self, module: PreTrainedModel, pad_token_id: int, temperature: float, device: str) -> None:
        """Find out whether the module's logits are its head's output alone.

        Some architectures scale or cap the logits after the head; for them the module's own forward pass is
        used, which keeps the logits of all positions in memory.

        Args:
            module: a causal language model.
            pad_token_id: what short rows are filled up with; never attended to.
            temperature: logits are divided by it.
            device: where the module is.
        """
        self._module = module
        self._decoder: torch.nn.Module = module.get_decoder()  # type: ignore[no-untyped-call]  # transformers'
        self._head: torch.nn.Module = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # as above
        self._vocabulary_size = int(self._head.weight.shape[0])
        self._pad_token_id = pad_token_id
        self._temperature = temperature
        self._device = device
        self._has_plain_head = self._head_gives_the_logits()

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        """Give the log-probs of the rows' completion tokens, laid end to end.

        Returns:
            [tokens], nats, float32; carries the gradient unless it is switched off.
        """
        token_ids = self._token_ids(rows)
        lengths = torch.tensor([row.num_tokens for row in rows])
        positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
        attention_mask = positions < lengths[:, None]
        prompt_lengths = torch.tensor([len(row.group.group.prompt_token_ids) for row in rows])
        is_completion = (attention_mask & (positions >= prompt_lengths[:, None])).to(self._device)
        # The logits at a position are about the next token.
        is_before_completion = is_completion.roll(-1, dims=1)
        outputs = self._outputs(
            token_ids.to(self._device), attention_mask.long().to(self._device), positions.to(self._device)
        )
        return self._pieces(outputs[is_before_completion], token_ids.to(self._device)[is_completion])

    def _token_ids(self, rows: Sequence[Row]) -> torch.Tensor:
        """Lay prompt and completion of every row side by side, filled up on the right."""
        width = max(row.num_tokens for row in rows)
        token_ids = torch.full((len(rows), width), self._pad_token_id, dtype=torch.long)
        for index, row in enumerate(rows):
            prompt = torch.as_tensor(row.group.group.prompt_token_ids)
            token_ids[index, : len(prompt)] = prompt
            token_ids[index, len(prompt) : row.num_tokens] = torch.as_tensor(row.completion.token_ids)
        return token_ids

    def _outputs(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run the module up to its head if the head gives the logits, else to the end."""
        if self._has_plain_head:
            states = self._decoder(
                input_ids=token_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            )
            return cast(torch.Tensor, states.last_hidden_state)
        results = self._module(
            input_ids=token_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        return cast(torch.Tensor, results.logits)

    def _pieces(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Turn what ``_outputs`` gave into log-probs, so many tokens at a time that their logits fit."""
        size = max(1, MAX_LOGITS // self._vocabulary_size)
        if len(targets) <= size:
            return self._piece(outputs, targets)
        pieces = [
            cast(torch.Tensor, checkpoint(self._piece, *piece, use_reentrant=False))
            for piece in zip(torch.split(outputs, size), torch.split(targets, size), strict=True)
        ]
        return torch.cat(pieces)

    def _piece(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(outputs) if self._has_plain_head else outputs
        scaled = logits.float() / self._temperature
        return scaled.gather(-1, targets[:, None]).squeeze(-1) - scaled.logsumexp(-1)

    def _head_gives_the_logits(self) -> bool:
        """Compare the module's logits with its head's on a few tokens."""
        was_training = self._module.training
        self._module.train(False)
        num_tokens = min(8, self._vocabulary_size)
        probe = torch.arange(num_tokens, device=self._device)[None]
        with torch.no_grad():
            logits = self._module(input_ids=probe, use_cache=False).logits
            states = self._decoder(input_ids=probe, use_cache=False).last_hidden_state
            is_equal = torch.equal(self._head(states), logits)
        self._module.train(was_training)
        return is_equal
