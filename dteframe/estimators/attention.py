"""The estimator of the DOTS paper: attention from every question to a few that were just measured.

The mathematics is in ``attention_math``, the embeddings in ``embeddings``, the trained part in ``adapter``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from dteframe import (
    Component,
    Context,
    Estimator,
    EstimatorConfig,
    Observation,
    Question,
    SuccessEstimate,
    TextEncoder,
    hookimpl,
)
from dteframe.estimators import attention_math
from dteframe.estimators.adapter import Adapter, load_adapter
from dteframe.estimators.embeddings import EmbeddingsConfig, PolicyEmbeddings, embed, embedder_of
from dteframe.records import State

SCORE_TEMPERATURES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0)
"""What is tried without an adapter: from nearly the nearest reference alone to nearly the mean of all."""
SAME_EMBEDDING_COSINE = 0.99
"""Below this a question's embedding is not the one of the checkpoint: rounding on another device is above."""


class AttentionConfig(EstimatorConfig):
    """Options of ``attention``."""

    type: Literal["attention"] = "attention"
    reference_size: int = Field(default=256, ge=2)
    """Reference questions rolled out at each plan (K of the paper)."""
    embeddings: EmbeddingsConfig = PolicyEmbeddings()
    """Where the questions' embeddings come from: ``{type: policy}``, ``{type: sentence, path: ...}`` or
    ``{type: lm, path: ...}``."""
    adapter: str | None = None
    """File of a trained adapter (safetensors); null is attention on the plain embeddings, centred over the
    pool and scaled to length 1, without a calibration head."""
    score_temperature: float | None = Field(default=None, gt=0)
    """Attention scores are divided by it. null is 1 with an adapter, as it was trained; without one it is
    chosen anew at each prediction among 8 values from 0.02 to 10 by the leave-one-out likelihood of the
    references."""
    recalibrate: Literal["leave_one_out", "none"] = "leave_one_out"
    """Correct all predictions by a line fitted to the references' leave-one-out predictions, or not."""
    prior_rollouts: float = Field(default=8.0, gt=0)
    """Rollouts that the prediction counts for where a question was measured itself (kappa)."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Ask for few references, so that a small pool suffices."""
        return cls(reference_size=4)

    def num_references(self) -> int:
        """Count the reference questions of a plan."""
        return self.reference_size


@dataclass(slots=True)
class Counts:
    """Successes and trials by position in the pool, measured under one policy version: the newest."""

    policy_version: int = -1
    by_position: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, policy_version: int, position: int, successes: int, trials: int) -> None:
        """Add to that version's counts; a newer version starts anew, an older one is outdated and let go."""
        if policy_version > self.policy_version:
            self.policy_version = policy_version
            self.by_position = {}
        if policy_version == self.policy_version:
            before = self.by_position.get(position, (0, 0))
            self.by_position[position] = (before[0] + successes, before[1] + trials)

    def columns(self) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Give positions in ascending order, successes and trials."""
        rows = [(position, *self.by_position[position]) for position in sorted(self.by_position)]
        positions, successes, trials = np.array(rows, np.int64).reshape(-1, 3).T
        return positions, successes, trials


@final
class AttentionEstimator(Estimator):
    """Predict success rates by attention over reference questions that were just rolled out.

    The reference set is what was observed with purpose ``reference`` under the newest policy version that has
    such observations; its questions are predicted from the others, and their own counts are blended in:
    (kappa * prediction + successes) / (kappa + trials). Counts of training groups are not used: the update
    that follows them has outdated them before the next prediction. Before the first reference every mean is
    0.5 with evidence 0.

    ``evidence`` is one number for all unmeasured questions, from the references' leave-one-out errors (see
    ``prediction_evidence``), and that number plus the trials for measured ones.

    Figures, all over the references: ``leave_one_out_pearson`` (left out where the rates or the predictions
    are all equal) and ``leave_one_out_brier`` of the predictions before the line is applied;
    ``recalibration_slope``, ``recalibration_intercept`` and ``recalibration_unlimited_slope`` of the line;
    ``score_temperature``. Where attention is nearly flat, a reference's prediction is the mean of the others,
    which falls as its own rate rises: a correlation near -1 means that the embeddings tell nothing.

    Source: DOTS, arXiv:2506.05316, 4.1 and App. C.1. The leave-one-out fit, the blending with own counts, the
        evidence and attention without an adapter's head are ours.
    """

    config: AttentionConfig

    def __init__(self, config: AttentionConfig, context: Context) -> None:
        """Start without measurements."""
        super().__init__(config, context)
        self._references = Counts()

    def start(self, questions: Sequence[Question], encode_with_policy: TextEncoder) -> None:
        """Embed the pool, and pass it through the adapters once: both stay as they are in the whole run."""
        self._ids = tuple(question.id for question in questions)
        self._positions = {name: position for position, name in enumerate(self._ids)}
        if self.config.reference_size > len(questions):
            raise ValueError(
                f"attention: reference_size {self.config.reference_size} is more than the "
                f"{len(questions)} questions of the pool; lower estimator.reference_size"
            )
        embedder = embedder_of(self.config.embeddings, encode_with_policy, self.context)
        embeddings = embed([question.text for question in questions], embedder, self.context)
        self._first_embedding = embeddings[0]
        self._adapter = self._load_adapter(embedder.id, embeddings.shape[1])
        if self._adapter is None:
            self._queries = attention_math.centre_and_normalise(embeddings)
            self._keys = self._queries
            if not self._queries.any():
                self.context.warn(
                    f"attention: the embeddings of all {len(questions)} questions are equal; every "
                    "prediction will be the references' mean; choose other estimator.embeddings"
                )
        else:
            self._queries = self._adapter.transform("query", embeddings)
            self._keys = self._adapter.transform("reference", embeddings)

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Draw ``reference_size`` questions uniformly without replacement."""
        drawn = rng.choice(len(self._ids), self.config.reference_size, replace=False)
        return tuple(self._ids[position] for position in drawn)

    def observe(self, observation: Observation) -> None:
        """Count the successes and trials of references."""
        columns = (observation.question_ids, observation.successes.tolist(), observation.trials.tolist())
        for name, successes, trials in zip(*columns, strict=True):
            if name not in self._positions:
                raise ValueError(
                    f"attention: observed question {name!r}, which is not among the "
                    f"{len(self._ids)} of the pool"
                )
            if not 0 <= successes <= trials or trials < 1:
                raise ValueError(f"attention: question {name!r} has {successes} successes in {trials} trials")
            if observation.purpose == "reference":
                position = self._positions[name]
                self._references.add(observation.policy_version, position, successes, trials)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Attend, calibrate, correct by the line, and blend in own counts."""
        mean = np.full(len(self._ids), 0.5)
        evidence = np.zeros(len(self._ids))
        figures: dict[str, float] = {}
        if self._references.by_position:
            mean, evidence, figures = self._attend()
        successes, trials = np.zeros(len(self._ids)), np.zeros(len(self._ids))
        positions, solved, tried = self._references.columns()
        successes[positions], trials[positions] = solved, tried
        prior = self.config.prior_rollouts
        mean = (prior * mean + successes) / (prior + trials)
        return SuccessEstimate(self._ids, mean, evidence + trials, figures)

    def state_dict(self) -> State:
        """Give the measurements, and one embedding by which a changed embedder is noticed."""
        return {
            "references": self._state_of(self._references),
            "first_embedding": self._first_embedding,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back.

        Raises:
            ValueError: the embeddings are not those of the checkpoint.
        """
        before = np.asarray(state["first_embedding"], np.float64)
        now = self._first_embedding.astype(np.float64)
        lengths = float(np.linalg.norm(before) * np.linalg.norm(now))
        if before.shape != now.shape or before @ now < SAME_EMBEDDING_COSINE * lengths:
            raise ValueError(
                f"attention: the embedding of question {self._ids[0]!r} is not the checkpoint's; resume with "
                "the same dataset and embeddings (those of the policy as it was before training)"
            )
        self._references = self._counts_from(state["references"])

    def _attend(
        self,
    ) -> tuple[Float[np.ndarray, "pool"], Float[np.ndarray, "pool"], dict[str, float]]:
        """Predict the pool from the references; those themselves from the others."""
        positions, successes, trials = self._references.columns()
        rates = successes / trials
        scores = self._queries @ self._keys[positions].T
        if self._adapter is not None:
            scores /= np.float32(np.sqrt(self._keys.shape[1]))
        temperature = self._score_temperature(scores[positions], successes, trials)
        scores /= np.float32(temperature)
        mean = attention_math.attend(scores, rates)
        left_out = attention_math.leave_one_out(scores[positions], rates)
        if self._adapter is not None:
            statistics = attention_math.rate_statistics(rates)
            mean = attention_math.calibrate(mean, *self._adapter.scale_and_shift(statistics[None]))
        if self._adapter is not None and len(rates) > 1:
            statistics = attention_math.leave_one_out_statistics(rates)
            left_out = attention_math.calibrate(left_out, *self._adapter.scale_and_shift(statistics))
        mean[positions] = left_out
        figures = {"leave_one_out_brier": float(np.mean((left_out - rates) ** 2))}
        correlation = attention_math.pearson(left_out, rates)
        if correlation is not None:
            figures["leave_one_out_pearson"] = correlation
        if self.config.recalibrate == "leave_one_out":
            line = attention_math.fit_line(left_out, rates)
            mean, left_out = line.apply(mean), line.apply(left_out)
            figures["recalibration_slope"] = line.slope
            figures["recalibration_intercept"] = line.intercept
            figures["recalibration_unlimited_slope"] = line.unlimited_slope
        figures["score_temperature"] = temperature
        evidence = attention_math.prediction_evidence(left_out, successes, trials)
        return mean, np.full(len(mean), evidence), figures

    def _score_temperature(
        self,
        scores: Float[np.ndarray, "references references"],
        successes: Int[np.ndarray, "references"],
        trials: Int[np.ndarray, "references"],
    ) -> float:
        """Give the recipe's, the adapter's, or the one under which the references predict each other best."""
        if self.config.score_temperature is not None:
            return self.config.score_temperature
        if self._adapter is not None:
            return 1.0
        rates = successes / trials
        likelihoods = [
            attention_math.log_likelihood(
                attention_math.leave_one_out(scores / temperature, rates), successes, trials
            )
            for temperature in SCORE_TEMPERATURES
        ]
        return SCORE_TEMPERATURES[int(np.argmax(likelihoods))]

    def _load_adapter(self, embedder_id: str, width: int) -> Adapter | None:
        if self.config.adapter is None:
            return None
        path = Path(self.config.adapter).expanduser()
        adapter = load_adapter(path)
        if (adapter.shape.embedder_id, adapter.shape.width) != (embedder_id, width):
            raise ValueError(
                f"{path}: the adapter was trained on embeddings {adapter.shape.embedder_id!r} of width "
                f"{adapter.shape.width}, the recipe's are {embedder_id!r} of width {width}; change "
                "estimator.embeddings or estimator.adapter"
            )
        return adapter

    def _state_of(self, counts: Counts) -> State:
        positions, successes, trials = counts.columns()
        return {
            "policy_version": counts.policy_version,
            "question_ids": [self._ids[position] for position in positions],
            "successes": successes,
            "trials": trials,
        }

    def _counts_from(self, state: Mapping[str, Any]) -> Counts:
        counts = Counts(int(state["policy_version"]))
        columns = (state["question_ids"], state["successes"], state["trials"])
        for name, successes, trials in zip(*columns, strict=True):
            counts.add(counts.policy_version, self._positions[name], int(successes), int(trials))
        return counts


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [AttentionEstimator]
