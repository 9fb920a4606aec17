"""Attention from questions to references, as estimators use it: embeddings, adapter, calibration, evidence.

The mathematics is in ``attention_math``, the embeddings in ``embeddings``, the trained part in ``adapter``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int, Num
from pydantic import Field

from dteframe import Context, EstimatorConfig, Observation, PolicyEncoder, Question
from dteframe.estimators import attention_math
from dteframe.estimators.adapter import Adapter, load_adapter
from dteframe.estimators.easiness import Prior
from dteframe.estimators.embedding_options import EmbeddingsConfig, PolicyEmbeddings
from dteframe.estimators.embeddings import embed, embedder_of
from dteframe.estimators.observed import PoolIndex
from dteframe.estimators.references import AgedReferences, ReferenceSet, RolledOutReferences
from dteframe.estimators.scratch import scratch_matrix
from dteframe.records import State

SCORE_TEMPERATURES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0)
"""What is tried without an adapter: from nearly the nearest reference alone to nearly the mean of all."""
SAME_EMBEDDING_COSINE = 0.99
"""Below this a question's embedding is not the one of the checkpoint: rounding on another device is above."""
TRAINING_HALF_LIFE = 200.0
"""Of ``reference_half_life: null`` with ``references: training``, in steps."""
MAX_REMEMBERED = 512
"""Rolled-out references of earlier plans that are looked at at most: each is compared with each."""


class AttentionOptions(EstimatorConfig):
    """Options of every estimator that attends to references."""

    reference_size: int = Field(default=256, ge=2)
    """Reference questions rolled out at each plan (K of the paper); with ``references: training`` as many
    measured ones are looked at at most."""
    references: Literal["rolled_out", "training"] = "rolled_out"
    """Whose success rates are attended to: of questions rolled out for it at each plan, or of those that
    training measured anyway, which cost nothing and are a little outdated."""
    reference_half_life: float | None = Field(default=None, gt=0)
    """Steps after which a measured group counts for half. null: 200 with ``references: training``; of
    rolled-out references those of the newest plan alone count, as in the paper. A number there keeps earlier
    plans' references too, aged: many more of them at the same price."""
    embeddings: EmbeddingsConfig = PolicyEmbeddings()
    """Where the questions' embeddings come from: ``{type: policy}``, ``{type: sentence, path: ...}`` or
    ``{type: lm, path: ...}``."""
    adapter: str | None = None
    """File of a trained adapter (safetensors), relative to the folder in which the command runs; null is
    attention on the plain embeddings, centred over the pool and scaled to length 1, without a calibration
    head."""
    score_temperature: float | None = Field(default=None, gt=0)
    """Attention scores are divided by it. null is 1 with an adapter, as it was trained; without one it is
    chosen anew at each prediction among 8 values from 0.02 to 10 by the leave-one-out likelihood of the
    references."""
    recalibrate: Literal["leave_one_out", "none"] = "leave_one_out"
    """Correct all predictions by a line fitted to the references' leave-one-out predictions, or not."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Ask for few references, so that a small pool suffices."""
        return cls(reference_size=4)  # type: ignore[call-arg]  # every plugin's type has a default

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Say that the adapter's file is not here."""
        if self.adapter is not None and not Path(self.adapter).expanduser().is_file():
            yield "adapter", f"{self.adapter}: there is no such file, seen from {Path.cwd()}"

    def num_references(self) -> int:
        """Count the reference questions of a plan."""
        return self.reference_size if self.references == "rolled_out" else 0

    @property
    def looks_at_newest_plan(self) -> bool:
        """Whether the references are those of the newest plan alone."""
        return self.references == "rolled_out" and self.reference_half_life is None


@dataclass(frozen=True, slots=True)
class AttentionPrediction:
    """What the references say of some questions; of a reference itself, what the others say."""

    references: ReferenceSet
    mean: Float[np.ndarray, "queries"]
    evidence: float
    """Rollouts that each of the means is worth."""
    figures: Mapping[str, float]


class AttentionPredictor:
    """Embeddings of a pool, references among its questions, and what these say of the others."""

    def __init__(
        self,
        options: AttentionOptions,
        questions: Sequence[Question],
        encode_with_policy: PolicyEncoder,
        context: Context,
    ) -> None:
        """Embed the pool, and pass it through the query adapter once: both stay so in the whole run."""
        self._options, self.index = options, PoolIndex(questions, options.type)
        self._references = _reference_record(options, len(questions))
        if options.references == "rolled_out" and options.reference_size > len(questions):
            raise ValueError(
                f"{options.type}: reference_size {options.reference_size} is more than the "
                f"{len(questions)} questions of the pool; lower estimator.reference_size"
            )
        embedder = embedder_of(options.embeddings, encode_with_policy, context)
        embeddings = embed([question.text for question in questions], embedder, context)
        self._first_embedding = np.array(embeddings[0])
        self._embeddings, self._adapter = embeddings, self._load_adapter(embedder.id, embeddings.shape[1])
        if self._adapter is None:
            attention_math.centre_and_normalise(embeddings)
            self._queries = embeddings
            if not embeddings.any():
                context.warn(
                    f"{options.type}: the embeddings of all {len(questions)} questions are equal; every "
                    "prediction will be the references' mean; choose other estimator.embeddings"
                )
        else:
            folder, size = context.cache_folder / "embeddings", self._adapter.shape.hidden_width
            self._queries = scratch_matrix(folder, len(embeddings), size)
            self._easiness = np.empty(len(embeddings))
            for rows in self._pieces():
                self._queries[rows] = self._adapter.transform("query", embeddings[rows])
                self._easiness[rows] = self._adapter.easiness.of(embeddings[rows])
        lengths = (float(np.linalg.norm(self._queries[rows], axis=1).max()) for rows in self._pieces())
        self._longest_query = max(lengths)

    def draw(self, rng: np.random.Generator) -> tuple[str, ...]:
        """Draw the questions to roll out uniformly without replacement, if any are to be."""
        count = self._options.num_references()
        if not count:
            return ()
        return tuple(self.index.ids[place] for place in rng.choice(len(self.index), count, replace=False))

    def observe(self, observation: Observation) -> None:
        """Count the successes and trials of references."""
        self._references.observe(self.index.rows(observation), observation)

    def predict(
        self, policy_version: int, positions: Int[np.ndarray, "queries"] | None = None
    ) -> AttentionPrediction | None:
        """Attend, calibrate and correct by the line; of the whole pool unless positions are given.

        Args:
            policy_version: up to which references age.
            positions: which questions to predict; distinct.

        Returns:
            None before there is any reference. Where references' trials differ, each weighs as much as it
            has.
        """
        references = self._references.at(policy_version)
        if not len(references):
            return None
        rates, trials = references.rates, None if references.are_alike else references.trials
        keys = self._keys(references.positions)
        own_scores = self._queries[references.positions] @ keys.T
        queries = self._queries if positions is None else self._queries[positions]
        if self._adapter is None:
            temperature, left_out = self._attend_among(references, own_scores, trials)
            keys /= np.float32(temperature)
            mean = attention_math.attend_from(queries, self._longest_query, keys, rates, trials)
        else:
            temperature = self._options.score_temperature or 1.0
            keys /= np.float32(temperature)
            easiness = self._easiness if positions is None else self._easiness[positions]
            prior = Prior(self._easiness[references.positions], references)
            own_scores /= np.float32(temperature)
            left_out = prior.left_out(own_scores if trials is None else own_scores + np.log(trials))
            deviations = rates - prior.of(prior.easiness)
            mean = attention_math.attend_from(queries, self._longest_query, keys, deviations, trials)
            mean += prior.of(easiness)
            if len(rates) > 1:
                statistics = attention_math.leave_one_out_statistics(rates)
                left_out = attention_math.calibrate(left_out, *self._adapter.scale_and_shift(statistics))
            statistics = attention_math.rate_statistics(rates)[None]
            mean = attention_math.calibrate(mean, *self._adapter.scale_and_shift(statistics))
        if positions is None:
            mean[references.positions] = left_out
        else:
            places = np.searchsorted(references.positions, positions)
            is_reference = references.positions[np.minimum(places, len(references) - 1)] == positions
            mean[is_reference] = left_out[places[is_reference]]
        figures = {"leave_one_out_brier": float(np.mean((left_out - rates) ** 2))}
        correlation = attention_math.pearson(left_out, rates)
        if correlation is not None:
            figures["leave_one_out_pearson"] = correlation
        if self._options.recalibrate == "leave_one_out":
            line = attention_math.fit_line(left_out, rates, trials)
            mean, left_out = line.apply(mean), line.apply(left_out)
            figures["recalibration_slope"] = line.slope
            figures["recalibration_intercept"] = line.intercept
            figures["recalibration_unlimited_slope"] = line.unlimited_slope
        figures["score_temperature"] = temperature
        evidence = attention_math.prediction_evidence(left_out, references.successes, references.trials)
        return AttentionPrediction(references, mean, evidence, figures)

    def state_dict(self) -> State:
        """Give the measurements, and one embedding by which a changed embedder is noticed."""
        return {
            "references": self._references.state_dict(self.index),
            "first_embedding": self._first_embedding,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the measurements back.

        Raises:
            ValueError: the first question's embedding is not that of the checkpoint.
        """
        then, now = np.asarray(state["first_embedding"], np.float64), self._first_embedding.astype(np.float64)
        lengths = float(np.linalg.norm(then) * np.linalg.norm(now))
        if then.shape != now.shape or then @ now < SAME_EMBEDDING_COSINE * lengths:
            raise ValueError(
                f"{self._options.type}: the embedding of question {self.index.ids[0]!r} is not the "
                "checkpoint's; resume with the same dataset and embeddings (those of the policy as it was "
                "before training)"
            )
        self._references.load_state_dict(state["references"], self.index)

    def _keys(self, positions: Int[np.ndarray, "references"]) -> Float[np.ndarray, "references width"]:
        """Give what queries are multiplied with, over the width's root where an adapter was trained so."""
        if self._adapter is None:
            return np.array(self._queries[positions])
        keys = self._adapter.transform("reference", self._embeddings[positions])
        return np.asarray(keys / np.float32(np.sqrt(keys.shape[1])))

    def _attend_among(
        self,
        references: ReferenceSet,
        scores: Float[np.ndarray, "references references"],
        trials: Num[np.ndarray, "references"] | None,
    ) -> tuple[float, Float[np.ndarray, "references"]]:
        """Predict the references from each other; give the temperature too.

        It is the recipe's, or the one under which they predict each other best.
        """
        given = self._options.score_temperature
        temperatures = SCORE_TEMPERATURES if given is None else (given,)
        predicted = attention_math.leave_one_out(scores, temperatures, references.rates, trials)
        likelihoods = [
            attention_math.log_likelihood(row, references.successes, references.trials) for row in predicted
        ]
        best = int(np.argmax(likelihoods))
        return temperatures[best], predicted[best]

    def _pieces(self) -> list[slice]:
        """Split the pool into as many rows as are in memory at a time."""
        size = attention_math.ROWS_AT_ONCE
        return [slice(first, first + size) for first in range(0, len(self._queries), size)]

    def _load_adapter(self, embedder_id: str, width: int) -> Adapter | None:
        if self._options.adapter is None:
            return None
        path = Path(self._options.adapter).expanduser()
        adapter = load_adapter(path)
        if (adapter.shape.embedder_id, adapter.shape.width) != (embedder_id, width):
            raise ValueError(
                f"{path}: the adapter was trained on embeddings {adapter.shape.embedder_id!r} of width "
                f"{adapter.shape.width}, the recipe's are {embedder_id!r} of width {width}; change "
                "estimator.embeddings or estimator.adapter"
            )
        return adapter


def _reference_record(options: AttentionOptions, num_questions: int) -> RolledOutReferences | AgedReferences:
    """Make the record of measured groups that the options ask for."""
    half_life = options.reference_half_life
    if options.references == "training":
        size, half_life = options.reference_size, half_life or TRAINING_HALF_LIFE
        return AgedReferences(num_questions, size, half_life, only_rolled_out=False)
    if half_life is None:  # the newest plan's alone
        return RolledOutReferences(num_questions)
    size = max(MAX_REMEMBERED, options.reference_size)
    return AgedReferences(num_questions, size, half_life, only_rolled_out=True)
