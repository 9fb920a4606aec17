"""Objectives: what is to be made small?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import BatchArithmetic

if TYPE_CHECKING:
    import torch


class ObjectiveConfig(PluginConfig):
    """Options that every objective has."""

    num_iterations: int = Field(default=1, ge=1)
    """Passes over a step's batch (mu of GRPO)."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass; each minibatch holds fresh and replayed groups in the batch's proportion."""

    def needs_reference_model(self) -> bool:
        """Whether ``Objective.loss`` will read ``reference_logprobs``."""
        return False

    def needs_proximal_of_replayed(self) -> bool:
        """Whether ``Objective.loss`` will read ``proximal_logprobs`` of replayed rollouts."""
        return True

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse more minibatches than groups: some would be empty."""
        if self.num_minibatches > arithmetic.questions_per_step:
            yield (
                "num_minibatches",
                f"{self.num_minibatches} minibatches need at least as many groups, but "
                f"training.questions_per_step is {arithmetic.questions_per_step}",
            )


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Completion tokens of a micro-batch, laid end to end; every tensor is [tokens]."""

    logprobs: torch.Tensor
    """Nats, of the policy being optimised, at the sampling temperature; carries the gradient."""
    proximal_logprobs: torch.Tensor
    """Nats, of the policy at the start of the step. Not a number where they would take a forward pass and the
    objective does not read them (``needs_proximal_of_replayed``)."""
    behaviour_logprobs: torch.Tensor
    """Nats, of the policy that sampled the token."""
    reference_logprobs: torch.Tensor | None
    """Nats, of the frozen reference model; None unless the objective ``needs_reference_model``."""
    advantages: torch.Tensor
    """Of the token's rollout."""
    rollout_index: torch.Tensor
    """Which rollout of the micro-batch the token is part of: 0, 0, 0, 1, 1, ... (int64)."""
    is_replayed: torch.Tensor
    """Whether the token's rollout came from the replay buffer (bool)."""
    num_rollouts: int
    """Rollouts of the whole minibatch, those of equal-reward groups included: a denominator."""
    num_tokens: int
    """Completion tokens of the whole minibatch, those of equal-reward groups included: a denominator."""
    max_completion_length: int


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """What an objective makes of a micro-batch."""

    loss: torch.Tensor
    """Scalar; the sum over a minibatch's micro-batches is the minibatch's loss."""
    sums: Mapping[str, torch.Tensor]
    """Figures as sums over tokens, scalars without gradient: the engine divides by the tokens that ran
    (``update/NAME``)."""


class Objective(Component):
    """What is to be made small?"""

    kind = "objective"
    config: ObjectiveConfig

    @property
    def needs_reference_model(self) -> bool:
        """Whether ``loss`` reads ``reference_logprobs``; the first policy is kept only then."""
        return self.config.needs_reference_model()

    @property
    def equal_rewards_carry_gradient(self) -> bool:
        """Whether a group of equal rewards has a gradient all the same (a KL term); else it is not run."""
        return self.needs_reference_model

    @abstractmethod
    def advantages(self, rewards: Float[np.ndarray, "group"]) -> Float[np.ndarray, "group"]:
        """Turn the rewards of one group into advantages, in the same order; all 0 for equal rewards."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Compute a micro-batch's share of the minibatch's loss, whatever the split into micro-batches."""
