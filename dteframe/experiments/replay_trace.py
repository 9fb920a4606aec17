"""Replay a trace as if training: references, predict, choose, measure, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from dteframe.contracts import Context, Estimator, Selector
from dteframe.engine import calls
from dteframe.engine.choose import Uses, choose
from dteframe.errors import DataError
from dteframe.records import BatchArithmetic, Observation, Purpose, Question, SuccessEstimate
from dteframe.traces import Trace


@dataclass(frozen=True, slots=True)
class Rounds:
    """What every question would have answered at every round."""

    questions: tuple[Question, ...]
    policy_versions: Int[np.ndarray, "rounds"]
    successes: Int[np.ndarray, "rounds questions"]
    trials: Int[np.ndarray, "rounds questions"]

    def part(self, number: int, of: int) -> Rounds:
        """Keep every ``of``-th question, from ``number`` on."""
        kept = slice(number, None, of)
        return Rounds(
            self.questions[kept], self.policy_versions, self.successes[:, kept], self.trials[:, kept]
        )


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


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay."""

    forecasts: Forecasts
    informative_fractions: Float[np.ndarray, "rounds"]
    """Of the groups that the selector chose; NaN where references filled the plan and it chose none."""
    reference_rollouts: int
    seconds: float
    """Of the estimator and the selector, after their start."""


def rounds_of(trace: Trace, num_rounds: int | None) -> Rounds:
    """Lay a trace out as rounds: at round r of R a question gives its visit r n / R of its n.

    No visit is used in two rounds, so that no prediction has seen what it is judged by.

    Args:
        trace: its reference and training groups count; evaluation is another way of asking.
        num_rounds: at most the fewest visits that any question has; None is that many.

    Raises:
        DataError: some question has fewer visits, or all have but one.
    """
    is_used = np.array([purpose != "evaluation" for purpose in trace.purposes])
    rows = np.flatnonzero(is_used)
    visits: list[list[int]] = [[] for _ in trace.question_ids]
    for row in rows:
        visits[trace.question[row]].append(int(row))
    fewest = min(len(visit) for visit in visits)
    count = fewest if num_rounds is None else num_rounds
    if not 2 <= count <= fewest:
        name = trace.question_ids[min(range(len(visits)), key=lambda place: len(visits[place]))]
        raise DataError(
            f"trace: {count} rounds need every question at least as often and 2 rounds at least, but "
            f"question {name!r} was measured {fewest} times; give a trace in which every question comes back"
        )
    chosen = np.array([[visit[number * len(visit) // count] for visit in visits] for number in range(count)])
    versions = np.maximum.accumulate(np.median(trace.policy_version[chosen], axis=1).astype(np.int64))
    columns = trace.columns or tuple({} for _ in trace.question_ids)
    questions = tuple(
        Question(name, text, text, "", None, extra)
        for name, text, extra in zip(trace.question_ids, trace.texts, columns, strict=True)
    )
    return Rounds(questions, versions, trace.successes[chosen], trace.trials[chosen])


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
    chose is measured. Informative references are part of the plan, as in a run.
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
    reference_rollouts, began = 0, time.perf_counter()
    for number, version in enumerate(rounds.policy_versions.tolist()):
        solved, tried = rounds.successes[number], rounds.trials[number]
        is_mixed = (solved > 0) & (solved < tried)
        rng = np.random.default_rng([seed, number])
        asked = [places[name] for name in calls.references(estimator, rng, places)]
        if asked:
            _observe(estimator, rounds, asked, number, "reference")
            reference_rollouts += int(tried[asked].sum())
        estimate = calls.predict(estimator, version, places)
        order = [places[name] for name in estimate.question_ids]
        mean, evidence = np.empty(len(ids)), np.empty(len(ids))
        mean[order], evidence[order] = estimate.mean, estimate.evidence
        is_left = np.ones(len(ids), bool)
        is_left[asked] = False
        left = np.flatnonzero(is_left)
        kept.append((np.full(len(left), number), left, mean[left], evidence[left], is_seen[left]))
        count = arithmetic.questions_per_plan
        reused = [place for place in asked if is_mixed[place]][:count]
        chosen = _choose(selector, estimate, ids, asked, count - len(reused), version, uses, rng, places)
        _observe(estimator, rounds, chosen, number, "train")
        _observe(selector, rounds, chosen, number, "train")
        informative.append(float(is_mixed[chosen].mean()) if chosen else float("nan"))
        is_seen[[*asked, *chosen]] = True
    seconds = time.perf_counter() - began
    columns = [np.concatenate(column) for column in zip(*kept, strict=True)]
    where = columns[0], columns[1]
    forecasts = Forecasts(
        columns[0], columns[1], columns[2], columns[3],
        rounds.successes[where], rounds.trials[where], columns[4],
    )  # fmt: skip  # the fields' order
    return Replayed(forecasts, np.array(informative), reference_rollouts, seconds)


def _choose(  # noqa: PLR0913  # the state of a round
    selector: Selector,
    estimate: SuccessEstimate,
    ids: Sequence[str],
    asked: Sequence[int],
    count: int,
    step: int,
    uses: Uses,
    rng: np.random.Generator,
    places: dict[str, int],
) -> list[int]:
    candidates = estimate.without(frozenset(ids[place] for place in asked))
    choice = choose(selector, candidates, min(count, len(candidates.question_ids)), step, uses, rng)
    return [places[name] for name in choice.question_ids]


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


def _no_policy(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    raise DataError(
        "trace: there is no policy to embed questions with; set estimator.embeddings to {type: sentence, "
        "path: ...} or {type: lm, path: ...}"
    )
