"""Give up scoring where the reward is broken: a step's timeouts, each completion alone, add up to hours."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dteframe.engine.scoring import Attempt, Reply, Scores, score_group
from dteframe.recipe import TrainingConfig
from dteframe.records import FAILURES, Completion, Question

NOT_SCORED = "not scored: "
"""How the error of a completion begins that was given up."""
NUM_ALL_FAILED = 64
"""Completions after which scoring is given up where not one could be scored."""


class FailureWatch:
    """Counts failures among completions that were asked at once, in the order in which they are scored.

    It gives up where that order cannot matter, because the run will stop anyway, and after the first
    ``NUM_ALL_FAILED`` completions where all of them failed. Asked by several threads.
    """

    def __init__(self, training: TrainingConfig, num_completions: int) -> None:
        """Begin with none of ``num_completions`` scored."""
        self._max_fraction = training.max_reward_failure_fraction
        self._stops_at_first = training.on_reward_failure == "stop"
        self._num_completions = num_completions
        self._num_scored = 0
        self._num_failures = 0
        self._reason = ""
        self._lock = threading.Lock()

    def score(
        self, attempt: Attempt, names: Sequence[str], question: Question, completions: Sequence[Completion]
    ) -> Scores:
        """Score a group as ``score_group`` does; once given up, all that is left fails at once."""

        def attempt_unless_given_up(question: Question, completions: Sequence[Completion]) -> Reply:
            return Reply(None, error=self._reason) if self._reason else attempt(question, completions)

        scores = score_group(attempt_unless_given_up, names, question, completions)
        with self._lock:
            self._note(scores)
        return scores

    def _note(self, scores: Scores) -> None:
        if self._reason:
            return
        self._num_scored += len(scores.statuses)
        self._num_failures += sum(status in FAILURES for status in scores.statuses)
        all_failed = self._num_failures == self._num_scored >= NUM_ALL_FAILED and self._max_fraction < 1
        is_over = self._num_failures > self._max_fraction * self._num_completions
        if all_failed or is_over or (self._stops_at_first and self._num_failures):
            self._reason = f"{NOT_SCORED}{self._num_failures} of the {self._num_scored} before it failed"
