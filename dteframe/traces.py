"""Traces: how often which policy solved which question when; what estimators are judged on.

A trace is a table with a row per measured group. ``dteframe run`` writes one of every run; any table with
these columns is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from dteframe.errors import DataError
from dteframe.records import JsonValue

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED = ("question_id", "policy_version", "successes", "trials")
OPTIONAL = ("text", "purpose", "policy")
PURPOSES = ("train", "reference", "evaluation")
COLUMNS: Mapping[str, str] = {
    "question_id": "text; equal ids are the same question",
    "text": "text; the question alone, as estimators embed it; the id where the column is missing",
    "policy": "text; which run or model answered; empty where the column is missing",
    "policy_version": "whole number; training steps that the policy had behind it: the time of the row",
    "purpose": "`train`, `reference` or `evaluation`; `train` where the column is missing",
    "successes": "whole number from 0 to `trials`",
    "trials": "whole number, at least 1: the rollouts of the group",
}
"""What each column holds; further columns belong to the question, and its first row counts."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Measured groups in order of time, and the questions that they answer."""

    question_ids: tuple[str, ...]
    """In the order of their first row in the file."""
    texts: tuple[str, ...]
    """One per question."""
    question: Int[np.ndarray, "rows"]
    """Position of the row's question in ``question_ids``."""
    policy_version: Int[np.ndarray, "rows"]
    """Rising."""
    successes: Int[np.ndarray, "rows"]
    trials: Int[np.ndarray, "rows"]
    """At least 1."""
    purposes: tuple[str, ...]
    """One of ``PURPOSES`` per row."""
    policies: tuple[str, ...]
    """Which run or model answered, per row."""
    columns: tuple[Mapping[str, JsonValue], ...] = field(default=())
    """The questions' further columns; one mapping per question, or nothing."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.question)


def read_trace(path: Path) -> Trace:
    """Read a trace in parquet or JSON lines, or a run folder's.

    Raises:
        DataError: there is no such file, it lacks a column, or a row is impossible; names file and row.
    """
    path = trace_file(path)
    return trace_of_rows(read_table(path), str(path))


def trace_file(path: Path) -> Path:
    """Give the trace in a run folder, or the file itself.

    Raises:
        DataError: the folder holds none.
    """
    if not path.is_dir():
        return path
    found = [file for file in (path / "trace.parquet", path / "trace.jsonl") if file.is_file()]
    if not found:
        raise DataError(f"{path}: holds neither trace.parquet nor trace.jsonl; give a trace or a run folder")
    return found[0]


def read_table(path: Path) -> Mapping[str, Sequence[Any]]:
    """Read a parquet or JSON lines file as Python values by column.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path}: no such file; give a trace (.parquet, .jsonl) or a run folder")
    try:
        is_json = path.suffix in (".jsonl", ".json")
        table = pyarrow.json.read_json(path) if is_json else pyarrow.parquet.read_table(path)
        columns: Mapping[str, Sequence[Any]] = table.to_pydict()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: neither parquet nor JSON lines ({error})") from error
    if len(columns) < table.num_columns:
        raise DataError(f"{path}: has two columns of one name ({', '.join(table.column_names)}); rename one")
    return columns


def trace_of_rows(table: Mapping[str, Sequence[Any]], where: str) -> Trace:
    """Check the columns of a table and make a trace of it, its rows sorted by time.

    Raises:
        DataError: a column is missing or a row is impossible; names the row, the first being 0.
    """
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise DataError(
            f"{where}: lacks the columns {', '.join(missing)} of a trace; has {', '.join(table) or 'none'}"
        )
    num_rows = len(table["question_id"])
    if num_rows == 0:
        raise DataError(f"{where}: has no rows")
    counts = {name: _whole_numbers(table[name], name, where) for name in REQUIRED[1:]}
    successes, trials = counts["successes"], counts["trials"]
    is_wrong = (trials < 1) | (successes < 0) | (successes > trials)
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise DataError(
            f"{where}: row {row} (question {table['question_id'][row]!r}) has {successes[row]} successes in "
            f"{trials[row]} trials; needs 0 <= successes <= trials and at least 1 trial"
        )
    purposes = [str(purpose) for purpose in table.get("purpose", ["train"] * num_rows)]
    strange = next((row for row, purpose in enumerate(purposes) if purpose not in PURPOSES), None)
    if strange is not None:
        raise DataError(
            f"{where}: row {strange} has the purpose {purposes[strange]!r}; must be one of "
            f"{', '.join(PURPOSES)}"
        )
    policies = ["" if policy is None else str(policy) for policy in table.get("policy", [""] * num_rows)]
    ids = [str(name) for name in table["question_id"]]
    first_rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        first_rows.setdefault(name, row)
    places = {name: place for place, name in enumerate(first_rows)}
    texts = [str(text) for text in table.get("text", ids)]
    extra = [name for name in table if name not in COLUMNS]
    order = np.argsort(counts["policy_version"], kind="stable")
    return Trace(
        question_ids=tuple(first_rows),
        texts=tuple(texts[row] for row in first_rows.values()),
        question=np.array([places[name] for name in ids], np.int64)[order],
        policy_version=counts["policy_version"][order],
        successes=successes[order],
        trials=trials[order],
        purposes=tuple(purposes[row] for row in order),
        policies=tuple(policies[row] for row in order),
        columns=tuple({name: table[name][row] for name in extra} for row in first_rows.values()),
    )


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace as parquet; questions' texts are stored once."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(_arrow_table(trace), path, compression="zstd", use_dictionary=True)


def _arrow_table(trace: Trace) -> pa.Table:
    import pyarrow as pa

    rows = trace.question.tolist()
    columns: dict[str, Any] = {
        "question_id": [trace.question_ids[place] for place in rows],
        "text": [trace.texts[place] for place in rows],
        "policy": list(trace.policies),
        "policy_version": trace.policy_version,
        "purpose": list(trace.purposes),
        "successes": trace.successes,
        "trials": trace.trials,
    }
    for name in trace.columns[0] if trace.columns else ():
        columns[name] = [trace.columns[place][name] for place in rows]
    return pa.table(columns)


def _whole_numbers(values: Sequence[Any], name: str, where: str) -> Int[np.ndarray, "rows"]:
    """Turn a column into integers, and refuse what is none, such as a rate or an empty cell."""
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or value % 1 != 0:
            raise DataError(
                f"{where}: row {row} has {name} {value!r}; must be a whole number (counts, not rates)"
            )
    return np.array([int(value) for value in values], np.int64)
