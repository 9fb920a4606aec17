"""Success rates that were recorded beforehand, of another model say; they never change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, final

import numpy as np
from pydantic import Field

from dteframe import (
    BatchArithmetic,
    Component,
    Estimator,
    EstimatorConfig,
    Observation,
    PolicyEncoder,
    Question,
    SuccessEstimate,
    hookimpl,
)
from dteframe.estimators.observed import PoolIndex
from dteframe.traces import read_trace, trace_of_rows, write_trace


class RecordedConfig(EstimatorConfig):
    """Options of ``recorded``: one of ``column`` and ``trace``."""

    type: Literal["recorded"] = "recorded"
    column: str | None = None
    """Column of the dataset that holds each question's success rate, in [0, 1]."""
    trace: str | None = None
    """Trace file or run folder whose groups are summed up per question; questions are found by their id, else
    by their text."""
    evidence: float = Field(default=8.0, gt=0)
    """Rollouts of the present policy that a recorded rate is worth."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Record some questions of the promises in a trace."""
        names = [f"sum-{index:03d}" for index in range(20)]
        counts = {"successes": [index % 9 for index in range(20)], "trials": [8] * 20}
        trace = trace_of_rows({"question_id": names, "policy_version": [0] * 20, **counts}, "example")
        write_trace(trace, folder / "recorded.parquet")
        return cls(trace=str(folder / "recorded.parquet"))

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse two sources, and none."""
        if (self.column is None) == (self.trace is None):
            yield "column", f"column is {self.column!r} and trace is {self.trace!r}; give one of them"


@final
class RecordedEstimator(Estimator):
    """Say what was recorded before the run: static difficulty, for comparisons.

    Questions without a record have the mean of the others, and no evidence; they are counted in a warning.

    Source: static labels as in AdaRFT, arXiv:2504.05520; its moving target is a selector's affair.
    """

    config: RecordedConfig

    def start(self, questions: Sequence[Question], encode_with_policy: PolicyEncoder) -> None:
        """Look the rates up.

        Raises:
            ValueError: a rate is not in [0, 1], or no question has one.
        """
        self._index = PoolIndex(questions, "recorded")
        rates = self._from_column(questions) if self.config.column else self._from_trace(questions)
        is_known = ~np.isnan(rates)
        source = f"column {self.config.column!r}" if self.config.column else str(self.config.trace)
        if not is_known.any():
            raise ValueError(
                f"recorded: {source} has a success rate of none of the {len(questions)} questions; give "
                "another estimator.column or estimator.trace"
            )
        if not is_known.all():
            self.context.warn(
                f"recorded: {source} has no success rate of {int((~is_known).sum())} of {len(questions)} "
                "questions; they are given the mean of the others"
            )
        self._mean = np.where(is_known, rates, rates[is_known].mean())
        self._evidence = np.where(is_known, self.config.evidence, 0.0)

    def observe(self, observation: Observation) -> None:
        """Check that the questions are known, and forget what was measured."""
        self._index.rows(observation)

    def predict(self, policy_version: int) -> SuccessEstimate:
        """Give the recorded rates."""
        return SuccessEstimate(self._index.ids, self._mean.copy(), self._evidence.copy())

    def _from_column(self, questions: Sequence[Question]) -> np.ndarray:
        rates = np.full(len(questions), np.nan)
        for position, question in enumerate(questions):
            value = question.columns.get(str(self.config.column))
            if value is None:
                continue
            if not isinstance(value, int | float) or not (0 <= value <= 1 or np.isnan(value)):
                raise ValueError(
                    f"recorded: question {question.id!r} has {self.config.column} {value!r}; success rates "
                    "lie in [0, 1]"
                )
            rates[position] = value
        return rates

    def _from_trace(self, questions: Sequence[Question]) -> np.ndarray:
        trace = read_trace(Path(str(self.config.trace)).expanduser())
        size = len(trace.question_ids)
        successes = np.bincount(trace.question, trace.successes, size)
        recorded = successes / np.bincount(trace.question, trace.trials, size)
        by_id = dict(zip(trace.question_ids, recorded, strict=True))
        by_text = {" ".join(text.split()): rate for text, rate in zip(trace.texts, recorded, strict=True)}
        missing = float("nan")
        return np.array(
            [by_id.get(item.id, by_text.get(" ".join(item.text.split()), missing)) for item in questions]
        )


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Add this file's plugin."""
    return [RecordedEstimator]
