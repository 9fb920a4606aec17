"""Estimators: how often would the present policy solve each question?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from jaxtyping import Float

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import Observation, Question, SuccessEstimate


class PolicyEncoder(Protocol):
    """Embeds texts with the policy."""

    def __call__(
        self, texts: Sequence[str], *, layer: int | None = None, suffix: str | None = None
    ) -> Float[np.ndarray, "texts width"]:
        """Average the policy's hidden states over each text's tokens, in float32.

        Args:
            texts: what is embedded.
            layer: number of layers that a text passes through; None is all, and the last normalisation.
            suffix: words behind each text; the state of their last token then stands beside the mean.

        Returns:
            Embeddings of the hidden states' width, or of twice that with a suffix.
        """


class EstimatorConfig(PluginConfig):
    """Options that every estimator has."""

    def num_references(self) -> int:
        """Count the reference questions that ``references`` asks for at each plan."""
        return 0


class Estimator(Component):
    """How often would the present policy solve each question?"""

    kind = "estimator"
    config: EstimatorConfig
    estimates: ClassVar[bool] = True
    """False for an estimator that knows nothing, so that selectors which need an estimate can be refused."""

    @abstractmethod
    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """See the pool before the first plan.

        Args:
            questions: all training questions; ids are distinct.
            encode_with_policy: embeds texts with the policy as it is before training; call it here alone.
        """

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Name the questions to roll out before the next prediction; distinct; empty if none are wanted."""
        return ()

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take note of measured successes: of every generated training and reference group.

        The order of questions inside an observation must not matter.

        Raises:
            ValueError: a question is unknown; names it.
        """

    @abstractmethod
    def predict(self, policy_version: int) -> SuccessEstimate:
        """Estimate the success rate of every question of the pool under the policy of that version."""
