"""What attention says of a question as prior, the question's own record as evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
from jaxtyping import Int
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Estimator,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)
from dteframe.beta_binomial import log_likelihood, parameters
from dteframe.estimators.attention_prediction import AttentionOptions, AttentionPredictor
from dteframe.estimators.observed import AgedRecord, drifting
from dteframe.records import State

PRIOR_ROLLOUTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Rollouts that the attention estimate may be worth (kappa)."""
PERSISTENCES = (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, float("inf"))
"""How slowly a record may wear off, in rollouts times steps."""
FIRST_CHOICE = (2, 5)
"""Places of what holds before there is anything to choose by: 2 rollouts, 2000 rollouts times steps."""
NATS_PER_PLACE = 1.0
"""How much likelier the groups must be for each place that the choice is away from the first one: where
nothing was measured twice, all persistences are equally likely."""


class HistoryAndAttentionConfig(AttentionOptions):
    """Options of ``history_and_attention``."""

    type: Literal["history_and_attention"] = "history_and_attention"
    references: Literal["rolled_out", "training"] = "training"
    """Whose success rates are attended to: of questions rolled out for it at each plan, or of those that
    training measured anyway, which cost nothing and are a little outdated."""
    prior_rollouts: float | None = Field(default=None, gt=0)
    """Rollouts that the attention estimate is worth (kappa); null: chosen as the run goes among 0.5 to 64 by
    how well each would have predicted the groups that came."""
    history_persistence: float | None = Field(default=None, gt=0)
    """How slowly a question's own record wears off (D), in rollouts times steps: what was measured ``age``
    steps ago counts for D / age rollouts at most. null: chosen likewise among 50 to 10,000 and never."""
    choice_half_life: float = Field(default=20.0, gt=0)
    """Batches after which a batch counts for half in those choices."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Look at few references, so that they are too many for the pool."""
        return cls(reference_size=4)


@final
class HistoryAndAttentionEstimator(Estimator):
    """Predict by attention where nothing else is known, and by the question's own record where there is one.

    The estimate is Beta(kappa p + s, kappa (1 - p) + f): p is the attention estimate, s and f are what is
    left of the question's successes and failures: n rollouts that are ``age`` steps old count for n / (1 + n
    age / D), as those of a rate that drifts at random. Prior strength kappa and persistence D are those under
    which the groups that came were likeliest, each judged before it was taken in: a good predictor earns a
    large kappa, a fast policy a small D. A half-life in place of D would be chosen by the questions that are
    asked again and again, and let those fade that a selector turned away from. A question without a record
    has mean and evidence of ``attention`` with the same options, to the last bit.

    Figures: those of the attention, ``prior_rollouts`` and ``history_persistence_rollout_steps`` (left out
    while it is without end).

    Source: BOTS, arXiv:2510.26374, with attention in place of two anchor models' interpolated rates; records
        that drift, and the choice of kappa and D by predictive likelihood, are ours.
    """

    config: HistoryAndAttentionConfig

    def __init__(self, config: HistoryAndAttentionConfig, context: Context) -> None:
        """Prepare the grid of what is chosen."""
        super().__init__(config, context)
        kappa, persistence = config.prior_rollouts, config.history_persistence
        self._kappas = np.array(PRIOR_ROLLOUTS if kappa is None else (kappa,))
        self._persistences = PERSISTENCES if persistence is None else (persistence,)
        self._scores = np.zeros((len(self._kappas), len(self._persistences)))
        first = FIRST_CHOICE[0] if kappa is None else 0, FIRST_CHOICE[1] if persistence is None else 0
        away = np.abs(np.indices(self._scores.shape) - np.reshape(first, (2, 1, 1))).sum(axis=0)
        self._doubts = NATS_PER_PLACE * away

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Embed the pool once."""
        self._predictor = AttentionPredictor(self.config, questions, encode_with_policy, self.context)
        self._record = AgedRecord(len(questions), [drifting(value) for value in self._persistences])

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Draw ``reference_size`` questions uniformly without replacement, if they are to be rolled out."""
        return self._predictor.draw(rng)

    def observe(self, observation: Observation) -> None:
        """Judge every prior strength and persistence by these groups, then take the groups in."""
        rows = self._predictor.index.rows(observation)
        self._judge(*rows, observation.policy_version)
        self._predictor.observe(observation)
        self._record.add(*rows, observation.policy_version)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Put prior and record together."""
        ids = self._predictor.index.ids
        attention = self._predictor.predict(policy_version)
        choice = np.unravel_index(int(np.argmax(self._scores - self._doubts)), self._scores.shape)
        kappa, persistence = float(self._kappas[choice[0]]), self._persistences[choice[1]]
        successes, trials = self._record.at(policy_version, int(choice[1]))
        if attention is None:
            known = np.maximum(trials, 1e-12)
            return SuccessEstimate(ids, np.where(trials > 0, successes / known, 0.5), trials)
        has_record = trials > 0
        evidence = np.where(has_record, kappa, attention.evidence) + trials
        figures = {**attention.figures, "prior_rollouts": kappa}
        if np.isfinite(persistence):
            figures["history_persistence_rollout_steps"] = persistence
        blended = np.clip((kappa * attention.mean + successes) / (kappa + trials), 0.0, 1.0)  # rounding
        return SuccessEstimate(ids, np.where(has_record, blended, attention.mean), evidence, figures)

    def state_dict(self) -> State:
        """Give the measurements and the likelihoods."""
        return {
            "attention": self._predictor.state_dict(),
            "record": self._record.state_dict(),
            "scores": self._scores.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: the embeddings are not those of the checkpoint.
        """
        self._predictor.load_state_dict(state["attention"])
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
        attention = self._predictor.predict(policy_version, positions)
        if attention is None:
            return
        batch = np.empty_like(self._scores)
        for place in range(len(self._persistences)):
            solved, tried = self._record.at(policy_version, place, positions)
            for row, kappa in enumerate(self._kappas):
                mean = (kappa * attention.mean + solved) / (kappa + tried)
                first, second = parameters(np.clip(mean, 1e-3, 1 - 1e-3), kappa + tried)
                batch[row, place] = log_likelihood(first, second, successes, trials).sum()
        self._scores = np.exp2(-1 / self.config.choice_half_life) * self._scores + batch


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [HistoryAndAttentionEstimator]
