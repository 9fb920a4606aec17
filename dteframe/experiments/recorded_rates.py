"""Recorded success rates from several tables, put together question by question."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dteframe.errors import DataError
from dteframe.estimators.adapter_training import SolveCounts
from dteframe.experiments.near_duplicates import near_duplicate_groups
from dteframe.experiments.published_traces import read_any_trace
from dteframe.traces import Trace, trace_file


@dataclass(frozen=True, slots=True)
class RecordedRates:
    """How often which policies solved which questions, and what the questions are."""

    texts: tuple[str, ...]
    """One per question of the counts, in their order; equal up to spacing is the same question."""
    counts: SolveCounts
    groups: Int[np.ndarray, "questions"]
    """Number of each question's group of near duplicates."""
    files: tuple[tuple[str, str, int], ...]
    """Name, SHA-256 and rows of each table."""


def read_recorded_rates(
    paths: Sequence[Path], tell: Callable[[str], None], *, until: int | None = None
) -> RecordedRates:
    """Read tables of success rates, traces and run folders, and add up what each policy did on each question.

    Rows of evaluation are left out, and counted: those questions are kept back.

    Args:
        paths: at least one table; rows without a policy are its file's own.
        tell: is told what is left out.
        until: policy version from which on rows are left out; None keeps all.

    Raises:
        DataError: a table cannot be read, lacks a column or the questions' texts, or a row is impossible.
    """
    rows: list[tuple[str, str, int, int]] = []
    texts: dict[str, str] = {}
    files = []
    for path in paths:
        trace = read_any_trace(path)
        check_texts(trace, path)
        ids = [question_id_of(text) for text in trace.texts]
        texts.update((name, text) for name, text in zip(ids, trace.texts, strict=True) if name not in texts)
        kept = [
            row
            for row, purpose in enumerate(trace.purposes)
            if purpose != "evaluation" and (until is None or trace.policy_version[row] < until)
        ]
        num_evaluation = trace.purposes.count("evaluation")
        if num_evaluation:
            tell(f"{path}: {num_evaluation} of {len(trace)} rows are of evaluation and are left out")
        rows += [
            (
                trace.policies[row] or path.stem,
                ids[trace.question[row]],
                int(trace.successes[row]),
                int(trace.trials[row]),
            )
            for row in kept
        ]
        files.append((path.name, digest_of(path), len(trace)))
    if not rows:
        raise DataError(f"{paths[0]}: no rows are left to fit to")
    counts = SolveCounts.from_table(*(list(column) for column in zip(*rows, strict=True)))
    ordered = tuple(texts[name] for name in counts.question_ids)
    return RecordedRates(ordered, counts, near_duplicate_groups(ordered), tuple(files))


def without_questions(
    recorded: RecordedRates, paths: Sequence[Path], tell: Callable[[str], None]
) -> RecordedRates:
    """Leave out the questions of some tables, and near duplicates of them.

    Raises:
        DataError: a table cannot be read, lacks the questions' texts, or nothing is left.
    """
    texts = list(recorded.texts)
    for path in paths:
        trace = read_any_trace(path)
        check_texts(trace, path)
        texts += trace.texts
    groups, count = near_duplicate_groups(texts), len(recorded.texts)
    kept = ~np.isin(groups[:count], groups[count:])
    if not kept.any():
        raise DataError(f"--without: its tables hold all {count} questions; leave out fewer, or fit to more")
    tell(f"{count - int(kept.sum())} of {count} questions are left out: they are in the tables of --without")
    return replace(
        recorded,
        texts=tuple(texts[place] for place in np.flatnonzero(kept)),
        counts=recorded.counts.of_questions(kept),
        groups=recorded.groups[kept],
    )


def check_texts(trace: Trace, path: Path) -> None:
    """Refuse a table whose questions have no text: nothing could be embedded.

    Raises:
        DataError: the column is missing, or a question's text is empty; names it.
    """
    if trace.texts == trace.question_ids:
        raise DataError(f"{path}: has no column text; adapters read the questions' texts")
    empty = next(
        (name for name, text in zip(trace.question_ids, trace.texts, strict=True) if not text.strip()), None
    )
    if empty is not None:
        raise DataError(f"{path}: question {empty!r} has no text; leave it out")


def question_id_of(text: str) -> str:
    """Name a question by its text; spacing does not count."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    """Hash a table; of a run folder, the trace in it."""
    with trace_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
