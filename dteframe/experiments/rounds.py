"""Lay a trace out as rounds: what every question answered, wherever it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from dteframe.errors import DataError
from dteframe.records import Question
from dteframe.traces import Trace

GROUPS_OF_A_ROUND = 32
"""Measured groups that a round has on average at least where rounds are stretches of time."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """What the questions answered at every round."""

    questions: tuple[Question, ...]
    policy_versions: Int[np.ndarray, "rounds"]
    successes: Int[np.ndarray, "rounds questions"]
    trials: Int[np.ndarray, "rounds questions"]
    """0 where a question was not measured in the round."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Groups of the trace that are in no round, counted by reason."""

    @property
    def is_measured(self) -> Bool[np.ndarray, "rounds questions"]:
        """Say which questions were measured in which rounds."""
        return np.asarray(self.trials > 0)

    @property
    def is_mixed(self) -> Bool[np.ndarray, "rounds questions"]:
        """Say where a measured group held both successes and failures."""
        return np.asarray((self.successes > 0) & (self.successes < self.trials))

    def part(self, number: int, of: int) -> Rounds:
        """Keep every ``of``-th question, from ``number`` on, and the rounds in which one is measured."""
        kept = slice(number, None, of)
        trials = self.trials[:, kept]
        rows = trials.any(axis=1)
        return Rounds(
            self.questions[kept],
            self.policy_versions[rows],
            self.successes[rows, kept],
            trials[rows],
            self.left_out,
        )


def rounds_of(trace: Trace, num_rounds: int | None) -> Rounds:
    """Lay a trace out by visits where every question comes back, by time where some do not.

    By visits, at round r of R a question gives its visit r n / R of its n. By time, a round is a stretch of
    policy versions, and a question is in it if it was measured then; of several times the first counts. No
    group is used in two rounds, so that no prediction has seen what it is judged by.

    Args:
        trace: its reference and training groups count; evaluation is another way of asking.
        num_rounds: None is as many as every question has visits; by time as many as leave
            ``GROUPS_OF_A_ROUND`` to a round.

    Raises:
        DataError: there are fewer than two rounds, or fewer policy versions than rounds of time.
    """
    is_used = np.array([purpose != "evaluation" for purpose in trace.purposes], bool)
    rows = np.flatnonzero(is_used)
    if not len(rows):
        raise DataError(
            f"trace: all {len(trace)} groups are evaluation; give one with training or reference groups"
        )
    if num_rounds is not None and num_rounds < 2:
        raise DataError(f"trace: {num_rounds} rounds; the second is the first that can judge, so at least 2")
    fewest = int(np.bincount(trace.question[rows], minlength=len(trace.question_ids)).min())
    if fewest >= (num_rounds or 2):
        chosen, reason = _by_visits(trace, rows, num_rounds or fewest), "between the rounds"
    else:
        chosen, reason = _by_time(trace, rows, num_rounds), "measured again in a round"
    is_measured = chosen >= 0
    kept = np.flatnonzero(is_measured.any(axis=0))
    chosen, is_measured = chosen[:, kept], is_measured[:, kept]
    versions = [int(np.median(trace.policy_version[row[row >= 0]])) for row in chosen]
    counts = {
        "evaluation": len(trace) - len(rows),
        reason: len(rows) - int(is_measured.sum()),
    }
    return Rounds(
        tuple(_question(trace, place) for place in kept.tolist()),
        np.maximum.accumulate(np.array(versions, np.int64)),
        np.where(is_measured, trace.successes[chosen], 0),
        np.where(is_measured, trace.trials[chosen], 0),
        {reason: count for reason, count in counts.items() if count},
    )


def _by_visits(
    trace: Trace, rows: Int[np.ndarray, "rows"], count: int
) -> Int[np.ndarray, "rounds questions"]:
    """Give the row of the visit that each question gives at each round."""
    visits: list[list[int]] = [[] for _ in trace.question_ids]
    for row in rows.tolist():
        visits[trace.question[row]].append(row)
    every = [[visit[number * len(visit) // count] for visit in visits] for number in range(count)]
    return np.array(every, np.int64)


def _by_time(
    trace: Trace, rows: Int[np.ndarray, "rows"], num_rounds: int | None
) -> Int[np.ndarray, "rounds questions"]:
    """Give the first row of each question in each stretch of policy versions; -1 where there is none."""
    versions = np.unique(trace.policy_version[rows])
    count = num_rounds or min(len(versions), max(2, len(rows) // GROUPS_OF_A_ROUND))
    if not 2 <= count <= len(versions):
        raise DataError(
            f"trace: {count} rounds need as many policy versions, or every question as often, but there are "
            f"{len(versions)} versions; give a trace of a longer time, or fewer --rounds"
        )
    found = np.full((count, len(trace.question_ids)), -1, np.int64)
    number = np.searchsorted(versions, trace.policy_version[rows]) * count // len(versions)
    _, first = np.unique(number * len(trace.question_ids) + trace.question[rows], return_index=True)
    found[number[first], trace.question[rows[first]]] = rows[first]
    return found


def _question(trace: Trace, place: int) -> Question:
    name, text = trace.question_ids[place], trace.texts[place]
    return Question(name, text, text, "", None, trace.columns[place] if trace.columns else {})
