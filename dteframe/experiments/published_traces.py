"""Tables of success rates that others publish, read as traces; told apart by their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dteframe.errors import DataError
from dteframe.traces import REQUIRED, Trace, read_table, read_trace, trace_of_rows

ROLLOUTS_PER_VISIT = 8
"""Of the run that published ``acc_by_visit`` (One-Shot-RLVR, DeepScaleR subset)."""
STEPS_OF_VISITS = 500
"""Its length: visit i of n was about at step 500 i / n, the step itself was not recorded."""
NOT_ANSWERS = ("id", "question", "answer", "gold_solution")


def read_any_trace(path: Path) -> Trace:
    """Read a trace, or a published table.

    Three forms are known beside a trace's own: ``acc_by_visit`` (a list of rates per question, in order of
    time), ``solve_rate`` with ``n_rollouts`` (one rate per question), and a column of 0 and 1 per model
    beside ``question`` and ``gold_solution``.

    Raises:
        DataError: the table is none of them, or a rate is impossible; names the row.
    """
    if path.is_dir() or path.suffix != ".parquet":
        return read_trace(path)
    table = read_table(path)
    where = str(path)
    if "acc_by_visit" in table:
        return trace_of_rows(_rows_of_visits(table, where), where)
    if {"solve_rate", "n_rollouts"} <= set(table):
        return trace_of_rows(_rows_of_solve_rates(table, where), where)
    if "gold_solution" in table and not set(REQUIRED) & set(table):
        return trace_of_rows(_rows_of_models(table, where), where)
    return trace_of_rows(table, where)


def _rows_of_visits(table: Mapping[str, Sequence[Any]], where: str) -> Mapping[str, Sequence[Any]]:
    _require_question(table, where)
    extra = [name for name in table if name not in ("question", "acc_by_visit", "n_visits", "index")]
    rows: dict[str, list[Any]] = _empty(*extra)
    for row, (text, rates) in enumerate(zip(table["question"], table["acc_by_visit"], strict=True)):
        if not isinstance(rates, list):
            raise DataError(f"{where}: row {row} has acc_by_visit {rates!r}; must be a list of success rates")
        for visit, rate in enumerate(rates):
            version = visit * STEPS_OF_VISITS // len(rates)
            _add(rows, row, text, version, _count(rate, ROLLOUTS_PER_VISIT, row, where), ROLLOUTS_PER_VISIT)
            for name in extra:
                rows[name].append(table[name][row])
    return rows


def _rows_of_solve_rates(table: Mapping[str, Sequence[Any]], where: str) -> Mapping[str, Sequence[Any]]:
    _require_question(table, where)
    rows = _empty()
    columns = zip(table["question"], table["solve_rate"], table["n_rollouts"], strict=True)
    for row, (text, rate, trials) in enumerate(columns):
        if not isinstance(trials, int):
            raise DataError(f"{where}: row {row} has n_rollouts {trials!r}; must be a whole number")
        _add(rows, row, text, 0, _count(rate, trials, row, where), trials)
    return rows


def _rows_of_models(table: Mapping[str, Sequence[Any]], where: str) -> Mapping[str, Sequence[Any]]:
    _require_question(table, where)
    rows: dict[str, list[Any]] = _empty("policy")
    for model in (name for name in table if name not in NOT_ANSWERS):
        for row, verdict in enumerate(table[model]):
            if verdict == -1:
                continue  # the source has no answer of that model
            _add(rows, row, table["question"][row], 0, _count(verdict, 1, row, where), 1)
            rows["policy"].append(model)
    return rows


def _require_question(table: Mapping[str, Sequence[Any]], where: str) -> None:
    if "question" not in table:
        raise DataError(f"{where}: lacks the column 'question' of a published table; has {', '.join(table)}")


def _empty(*extra: str) -> dict[str, list[Any]]:
    return {name: [] for name in (*REQUIRED, "text", *extra)}


def _add(rows: dict[str, list[Any]], row: int, text: str, version: int, successes: int, trials: int) -> None:
    values = (f"row-{row}", version, successes, trials, text)
    for name, value in zip((*REQUIRED, "text"), values, strict=True):
        rows[name].append(value)


def _count(rate: Any, trials: int, row: int, where: str) -> int:
    """Turn a rate back into a number of successes; means of several measurements are rounded."""
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise DataError(f"{where}: row {row} has the success rate {rate!r}; success rates lie in [0, 1]")
    return round(float(rate) * trials)
