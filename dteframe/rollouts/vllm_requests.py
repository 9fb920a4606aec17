"""What vLLM is asked and what it answers, alike for an engine in this process and for a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from dteframe import Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how its completions are sampled."""

    prompt_token_ids: Int[np.ndarray, "prompt"]
    num_generations: int
    sampling: Sampling
    seed: int
    """The prompt's, in [0, 2**63)."""
    end_token_ids: tuple[int, ...]

    def options(self) -> dict[str, Any]:
        """Give vLLM's sampling options; ``SamplingParams`` and the HTTP interface share their names.

        All that would change the distribution is given, because a server takes what is missing from the
        model's generation configuration: Qwen2.5's has top_p, top_k and a repetition penalty.
        """
        return {
            "n": self.num_generations,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "min_p": self.sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": self.sampling.max_completion_length,
            "min_tokens": 0,
            "seed": first_seed(self.seed),
            "stop_token_ids": list(self.end_token_ids),
            "ignore_eos": True,  # The end tokens are those of the policy, not of vLLM's idea of the model.
            "logprobs": 0,  # Of the sampled tokens alone.
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion as vLLM gives it."""

    token_ids: Int[np.ndarray, "completion"]
    logprobs: Float[np.ndarray, "completion"]
    """Nats, of the distribution sampled from."""
    finish_reason: Literal["stop", "length"]


def first_seed(seed: int) -> int:
    """Spread a prompt's seed: vLLM gives its completions this and the next numbers.

    Without it prompts with neighbouring seeds would share random numbers.

    >>> first_seed(0), first_seed(1)
    (3948308845846928943, 1858688918973179007)
    """
    spread: int = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0].item()
    return spread >> 2  # The numbers of the completions must stay below 2**63.
