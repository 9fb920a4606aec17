"""Rollouts: how are completions sampled?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.contracts.model import Policy
from dteframe.records import BatchArithmetic, Completion, ModelSizes, Prompt, Sampling, SamplingMemory


class RolloutConfig(PluginConfig):
    """How completions are sampled, whatever samples them."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, when sampling and in all log-probs."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens whose probability reaches this; 1 is off, and what keeps importance ratios
    exact."""
    top_k: int = Field(default=0, ge=0)
    """Only the k likeliest tokens; 0 is off."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Only tokens at least this fraction as likely as the likeliest; 0 is off."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens of an answer at most, the end-of-sequence token included; longer ones are cut and counted."""

    canary_every: int = Field(default=1, ge=0)
    """Takings over of new weights between canaries, which score a few completions by sampler and trainer; 0:
    never."""
    canary_bound_nats: float | None = Field(default=None, gt=0)
    """Mean absolute difference of the canary's log-probs that stops the run; null: by the model's dtype."""

    def sampling(self) -> Sampling:
        """Collect the sampling options."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.max_completion_length)

    def memory(
        self, sizes: ModelSizes, arithmetic: BatchArithmetic, num_processes: int, device_bytes: int | None
    ) -> SamplingMemory | None:
        """Say what sampling takes on the device of one process, or None where nobody can know.

        Args:
            sizes: the model's.
            arithmetic: how many completions, and how long.
            num_processes: the questions are split over them.
            device_bytes: memory of the device, if that is known.
        """
        return None


class Rollout(Component):
    """How are completions sampled?"""

    kind = "rollout"
    config: RolloutConfig
    shares_module: ClassVar[bool] = False
    """True where the module in training itself samples: its log-probs are then the trainer's up to rounding,
    and its weights are never stale."""

    @abstractmethod
    def start(self, policy: Policy) -> None:
        """See the policy before the first generation."""

    def sync(self, policy: Policy) -> None:
        """Take over the policy's new weights after an update; nothing to do where the module is shared."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Sample ``num_generations`` completions of each prompt; give them as they end, in any order.

        Each prompt is answered once: its place in ``prompts``, and its completions. They are scored while the
        others are sampled.

        Log-probs are those of the distribution sampled from: at ``sampling.temperature``, renormalised if
        ``sampling.is_truncated``.

        Args:
            prompts: the questions as tokens.
            num_generations: completions of each.
            sampling: temperature, truncation and greatest length.
            seeds: one a prompt, in [0, 2**63): all that its completions depend on beside the prompt and the
                weights, so that other prompts around it, or another number of processes, change nothing.
        """
