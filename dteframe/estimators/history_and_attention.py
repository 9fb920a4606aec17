"""What attention says of a question as prior, the question's own record as evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Estimator,
    Observation,
    Question,
    SuccessEstimate,
    TextEncoder,
    hookimpl,
)
from dteframe.beta_binomial import log_likelihood, parameters
from dteframe.estimators.attention_prediction import AttentionOptions, AttentionPredictor
from dteframe.estimators.observed import AgedRecord, PoolIndex
from dteframe.estimators.references import RolledOutReferences, TrainingReferences
from dteframe.records import State

PRIOR_ROLLOUTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Rollouts that the attention estimate may be worth (kappa)."""
HALF_LIVES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, float("inf"))
"""Steps after which a record may count for half."""
FIRST_CHOICE = (2, 5)
"""Places of what holds before there is anything to choose by: 2 rollouts, 50 steps."""
NATS_PER_PLACE = 1.0
"""How much likelier the groups must be for each place that the choice is away from the first one: where
nothing was measured twice, all half-lives are equally likely."""


class HistoryAndAttentionConfig(AttentionOptions):
    """Options of ``history_and_attention``."""

    type: Literal["history_and_attention"] = "history_and_attention"
    references: Literal["rolled_out", "training"] = "training"
    """Whose success rates are attended to: of questions rolled out for it at each plan, or of those that
    training measured anyway, which cost nothing and are a little outdated."""
    prior_rollouts: float | None = Field(default=None, gt=0)
    """Rollouts that the attention estimate is worth (kappa); null: chosen as the run goes among 0.5 to 64 by
    how well each would have predicted the groups that came."""
    history_half_life: float | None = Field(default=None, gt=0)
    """Steps after which a question's own record counts for half; null: chosen likewise among 1 to 200 and
    never."""
    choice_half_life: float = Field(default=20.0, gt=0)
    """Batches after which a batch counts for half in those choices."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Look at few references, so that they are too many for the pool."""
        return cls(reference_size=4)


@final
class HistoryAndAttentionEstimator(Estimator):
    """Predict by attention where nothing else is known, and by the question's own record where there is one.

    The estimate is Beta(kappa p + s, kappa (1 - p) + f): p is the attention estimate, s and f are the
    question's successes and failures, halved with every half-life. Prior strength kappa and half-life are
    those under which the groups that came were likeliest, each judged before it was taken in: a good
    predictor earns a large kappa, a fast policy a short half-life.

    Figures: those of the attention, ``prior_rollouts`` and ``history_half_life_steps`` (left out while it is
    without end).

    Source: BOTS, arXiv:2510.26374, with attention in place of two anchor models' interpolated rates; the
        choice of kappa and half-life by predictive likelihood is ours.
    """

    config: HistoryAndAttentionConfig

    def __init__(self, config: HistoryAndAttentionConfig, context: Context) -> None:
        """Prepare the grid of what is chosen."""
        super().__init__(config, context)
        kappa, half_life = config.prior_rollouts, config.history_half_life
        self._kappas = np.array(PRIOR_ROLLOUTS if kappa is None else (kappa,))
        self._half_lives = HALF_LIVES if half_life is None else (half_life,)
        self._scores = np.zeros((len(self._kappas), len(self._half_lives)))
        first = FIRST_CHOICE[0] if kappa is None else 0, FIRST_CHOICE[1] if half_life is None else 0
        away = np.abs(np.indices(self._scores.shape) - np.reshape(first, (2, 1, 1))).sum(axis=0)
        self._doubts = NATS_PER_PLACE * away
        self._references: RolledOutReferences | TrainingReferences

    def start(self, questions: Sequence[Question], encode_with_policy: TextEncoder) -> None:
        """Embed the pool once."""
        config, size = self.config, len(questions)
        self._index = PoolIndex(questions, "history_and_attention")
        self._predictor = AttentionPredictor(config, questions, encode_with_policy, self.context)
        self._record = AgedRecord(size, self._half_lives)
        if config.references == "rolled_out":
            self._references = RolledOutReferences(size)
        else:
            self._references = TrainingReferences(size, config.reference_size, config.reference_half_life)

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Draw ``reference_size`` questions uniformly without replacement, if they are to be rolled out."""
        count = self.config.num_references()
        if not count:
            return ()
        drawn = rng.choice(len(self._index), count, replace=False)
        return tuple(self._index.ids[position] for position in drawn)

    def observe(self, observation: Observation) -> None:
        """Judge every prior strength and half-life by these groups, then take the groups in."""
        rows = self._index.rows(observation)
        self._judge(*rows, observation.policy_version)
        self._references.observe(rows, observation)
        self._record.add(*rows, observation.policy_version)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Put prior and record together."""
        prior, figures = self._prior(policy_version)
        best, half_life = np.unravel_index(int(np.argmax(self._scores - self._doubts)), self._scores.shape)
        kappa = float(self._kappas[best])
        successes, trials = self._record.at(policy_version, int(half_life))
        strength = kappa if figures else 0.0
        evidence = strength + trials
        known = np.maximum(evidence, 1e-12)
        mean = np.where(evidence > 0, (strength * prior + successes) / known, prior)
        if figures:
            figures = {**figures, "prior_rollouts": kappa}
            if np.isfinite(self._half_lives[half_life]):
                figures["history_half_life_steps"] = self._half_lives[half_life]
        return SuccessEstimate(self._index.ids, np.clip(mean, 0.0, 1.0), evidence, figures)

    def state_dict(self) -> State:
        """Give the measurements, the likelihoods, and one embedding."""
        return {
            "references": self._references.state_dict(self._index),
            "record": self._record.state_dict(),
            "scores": self._scores.copy(),
            "first_embedding": self._predictor.first_embedding,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: the embeddings are not those of the checkpoint.
        """
        self._predictor.check_first_embedding(state["first_embedding"])
        self._references.load_state_dict(state["references"], self._index)
        self._record.load_state_dict(state["record"])
        self._scores = np.array(state["scores"], np.float64)

    def _judge(
        self,
        positions: Int[np.ndarray, "n"],
        successes: Int[np.ndarray, "n"],
        trials: Int[np.ndarray, "n"],
        policy_version: int,
    ) -> None:
        """Add the batch's log-likelihood under every choice, earlier batches fading."""
        prior, figures = self._prior(policy_version, positions)
        if not figures:
            return
        batch = np.empty_like(self._scores)
        for place in range(len(self._half_lives)):
            solved, tried = self._record.at(policy_version, place, positions)
            for row, kappa in enumerate(self._kappas):
                mean = (kappa * prior + solved) / (kappa + tried)
                first, second = parameters(np.clip(mean, 1e-3, 1 - 1e-3), kappa + tried)
                batch[row, place] = log_likelihood(first, second, successes, trials).sum()
        self._scores = np.exp2(-1 / self.config.choice_half_life) * self._scores + batch

    def _prior(
        self, policy_version: int, positions: Int[np.ndarray, "n"] | None = None
    ) -> tuple[Float[np.ndarray, "n"], Mapping[str, float]]:
        """Give what attention says of some questions, or all, with its figures; 0.5 without references."""
        references = self._references.at(policy_version)
        if not len(references):
            return np.full(len(self._index if positions is None else positions), 0.5), {}
        predicted = self._predictor.predict(references, positions)
        return predicted.mean, predicted.figures


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [HistoryAndAttentionEstimator]
