"""Replay a trace as if training: references, predict, choose, measure, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from dteframe.contracts import Context, Estimator, Selector
from dteframe.engine import calls
from dteframe.engine.choose import Uses, choose
from dteframe.errors import DataError
from dteframe.experiments.rounds import Rounds
from dteframe.records import BatchArithmetic, Observation, Purpose


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Every prediction that was made before its question was measured."""

    round: Int[np.ndarray, "forecasts"]
    question: Int[np.ndarray, "forecasts"]
    mean: Float[np.ndarray, "forecasts"]
    evidence: Float[np.ndarray, "forecasts"]
    successes: Int[np.ndarray, "forecasts"]
    trials: Int[np.ndarray, "forecasts"]
    is_seen: Bool[np.ndarray, "forecasts"]
    """Whether the question had been measured in an earlier round."""

    def at(self, places: np.ndarray) -> Forecasts:
        """Keep some of them, by place or by mask."""
        return Forecasts(*(getattr(self, item.name)[places] for item in fields(self)))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay."""

    forecasts: Forecasts
    informative_fractions: Float[np.ndarray, "rounds"]
    """Of the groups that the selector chose; NaN where references filled the plan and it chose none."""
    reference_rollouts: int
    replaced_references: int
    """References that were not measured in their round; others, that were, took their places."""
    missing_references: int
    """References for which there was no other."""
    predicting_seconds: float
    """Of the estimator, after its start: observing included."""
    choosing_seconds: float
    """Of the selector."""


def quiet_context(cache_folder: Path, run_folder: Path, seed: int, warn: Callable[[str], None]) -> Context:
    """Give surroundings on the CPU."""
    return Context(cache_folder, run_folder, "cpu", seed, progress=lambda *_: None, warn=warn)


def replay(
    rounds: Rounds,
    estimator: Estimator,
    selector: Selector,
    arithmetic: BatchArithmetic,
    seed: int,
) -> Replayed:
    """Go through the rounds; a round's plan is ``arithmetic.questions_per_plan`` questions.

    At each round the references are measured, all others are predicted, the selector chooses, and what it
    chose is measured. Informative references are part of the plan, as in a run. Only what was measured in a
    round can be revealed in it: where not all questions were, references that were not are replaced, and at
    most half of the measured questions are references and half of the others chosen, so that there is
    something to predict and to choose from.
    """
    ids = [question.id for question in rounds.questions]
    places = {name: place for place, name in enumerate(ids)}
    with calls.running(estimator):
        estimator.start(rounds.questions, _no_policy)
    with calls.running(selector):
        selector.start(arithmetic)
    uses, is_seen = Uses(), np.zeros(len(ids), bool)
    kept: list[tuple[np.ndarray, ...]] = []
    informative: list[float] = []
    spent, replaced, missing = 0, 0, 0
    predicting, choosing = Stopwatch(), Stopwatch()
    for number, version in enumerate(rounds.policy_versions.tolist()):
        is_measured, is_mixed = rounds.is_measured[number], rounds.is_mixed[number]
        rng = np.random.default_rng([seed, number])
        with predicting:
            wanted = [places[name] for name in calls.references(estimator, rng, places)]
        asked = _revealed(wanted, is_measured, rng)
        replaced += len(set(asked) - set(wanted))
        missing += len(wanted) - len(asked)
        with predicting:
            if asked:
                _observe(estimator, rounds, asked, number, "reference")
            estimate = calls.predict(estimator, version, places)
        spent += int(rounds.trials[number, asked].sum())
        order = [places[name] for name in estimate.question_ids]
        mean, evidence = np.empty(len(ids)), np.empty(len(ids))
        mean[order], evidence[order] = estimate.mean, estimate.evidence
        is_left = is_measured.copy()
        is_left[asked] = False
        left = np.flatnonzero(is_left)
        kept.append((np.full(len(left), number), left, mean[left], evidence[left], is_seen[left]))
        num_wanted = arithmetic.questions_per_plan
        num_reused = min(int(is_mixed[asked].sum()), num_wanted)
        limit = len(left) if is_measured.all() else len(left) // 2
        candidates = estimate.without(frozenset(ids[place] for place in np.flatnonzero(~is_left)))
        with choosing:
            count = min(num_wanted - num_reused, limit)
            choice = choose(selector, candidates, count, version, uses, arithmetic.num_generations, rng)
        chosen = [places[name] for name in choice.question_ids]
        if chosen:
            with predicting:
                _observe(estimator, rounds, chosen, number, "train")
            with choosing:
                _observe(selector, rounds, chosen, number, "train")
        informative.append(float(is_mixed[chosen].mean()) if chosen else float("nan"))
        is_seen[[*asked, *chosen]] = True
    columns = [np.concatenate(column) for column in zip(*kept, strict=True)]
    where = columns[0], columns[1]
    forecasts = Forecasts(
        columns[0], columns[1], columns[2], columns[3],
        rounds.successes[where], rounds.trials[where], columns[4],
    )  # fmt: skip  # the fields' order
    shares = np.array(informative)
    return Replayed(forecasts, shares, spent, replaced, missing, predicting.seconds, choosing.seconds)


class Stopwatch:
    """Adds up the seconds of what happens inside."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds = 0.0

    def __enter__(self) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """Add what it took."""
        self.seconds += time.perf_counter() - self._began


def _revealed(
    wanted: Sequence[int], is_measured: Bool[np.ndarray, "questions"], rng: np.random.Generator
) -> list[int]:
    """Give the wanted questions that were measured, and others drawn in place of those that were not."""
    if is_measured.all():
        return list(wanted)
    count = min(len(wanted), int(is_measured.sum()) // 2)
    found = [place for place in wanted if is_measured[place]][:count]
    others = np.setdiff1d(np.flatnonzero(is_measured), wanted)
    drawn = rng.choice(len(others), min(count - len(found), len(others)), replace=False)
    return [*found, *others[drawn].tolist()]


def _observe(
    observer: Estimator | Selector, rounds: Rounds, asked: Sequence[int], number: int, purpose: Purpose
) -> None:
    observation = Observation(
        tuple(rounds.questions[place].id for place in asked),
        rounds.successes[number, asked],
        rounds.trials[number, asked],
        int(rounds.policy_versions[number]),
        purpose,
    )
    with calls.running(observer):
        observer.observe(observation)


def _no_policy(texts: Sequence[str], **options: object) -> Float[np.ndarray, "texts width"]:
    raise DataError(
        "trace: there is no policy to embed questions with; set estimator.embeddings to {type: sentence, "
        "path: ...}, {type: lm, path: ...} or {type: ngrams}"
    )
