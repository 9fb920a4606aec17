"""Replay a trace with all estimators and selectors, and write the tables of docs/estimators.md.

    make estimators TRACE=FILE RATES=FILE        # the files are named in docs/estimators.md; five minutes

An adapter is fitted to the rates, without the trace's questions and near duplicates of them. Settings are
those of the sweeps; the tables are of the odd questions, on which none was chosen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "estimators.md"
SWEEPS = [
    Path(__file__).parents[1] / "recipes" / "sweeps" / name for name in ("estimators.yaml", "recorded.yaml")
]
ADAPTER = "ngrams.safetensors"
AGAINST = "history-uniform"
SETTINGS = ("training.questions_per_step=32", "--part", "1/2", "--against", AGAINST)
BEGIN, END = "<!-- {}: written by docs/write_estimator_tables.py -->", "<!-- end of {} -->"


def evaluate(trace: Path, rates: Path) -> Mapping[str, Any]:
    """Run the commands that a user would."""
    with tempfile.TemporaryDirectory() as folder:
        _dteframe(folder, "fit", str(rates.resolve()), "--without", str(trace.resolve()), "--out", ADAPTER)
        output = _dteframe(folder, "evaluate", str(trace.resolve()), *map(str, SWEEPS), *SETTINGS, "--json")
    return dict(json.loads(output))


def _dteframe(folder: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "dteframe", "estimator", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout


def scores(comparison: Mapping[str, Any]) -> str:
    """Lay out how every recipe did."""
    uniform = comparison["uniform_informative_fraction"]
    head = (
        "estimator, selector",
        "seen: r",
        "of the ceiling",
        "seen: NLL",
        "unseen: r",
        "unseen: NLL",
        "slope",
    )
    rows = [(*head, "informative", "times uniform", "reference rollouts")]
    for verdict in comparison["verdicts"]:
        seen, unseen = verdict["seen"] or {}, verdict["unseen"] or {}
        correlation, chosen = seen.get("pearson"), verdict["informative_fraction"]
        rows.append(
            (
                verdict["recipe"].replace("-", ", "),
                _plus_minus(correlation, 3),
                f"{correlation['value'] / seen['ceiling']['pearson']:.0%}" if correlation else "-",
                _plus_minus(seen.get("nll_nats"), 4),
                _plus_minus(unseen.get("pearson"), 2),
                _plus_minus(unseen.get("nll_nats"), 3),
                _plus_minus(verdict["everything"]["slope"], 2),
                _plus_minus(chosen, 3),
                f"{chosen['value'] / uniform:.2f}" if chosen else "-",
                f"{verdict['reference_rollouts']:.0f}",
            )
        )
    return _table(rows)


def differences(comparison: Mapping[str, Any]) -> str:
    """Lay out what each estimator has less the one that all are compared with, under uniform choice."""
    rows = [("estimator", "questions", "r", "Brier", "NLL")]
    for verdict in comparison["verdicts"]:
        name, selector = verdict["recipe"].split("-")
        if verdict["less_baseline"] is None or selector != "uniform":
            continue
        for questions in ("seen", "unseen"):
            less = verdict["less_baseline"][questions] or {}
            columns = (("pearson", 3), ("brier", 4), ("nll_nats", 4))
            rows.append((name, questions, *(_interval(less.get(key), digits) for key, digits in columns)))
    return _table(rows)


def rewrite(page: str, name: str, table: str) -> str:
    """Put the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE}: lacks {begin!r} and {end!r}; put them around the table")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def _plus_minus(score: Mapping[str, float] | None, digits: int) -> str:
    if score is None:
        return "-"
    return f"{score['value']:.{digits}f} ± {(score['high'] - score['low']) / 2:.{digits}f}"


def _interval(score: Mapping[str, float] | None, digits: int) -> str:
    if score is None:
        return "-"
    return "{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})".format(digits=digits, **score)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("two tables are needed; run `make estimators TRACE=FILE RATES=FILE`")
    result = evaluate(Path(sys.argv[1]), Path(sys.argv[2]))
    text = PAGE.read_text()
    for name, table in (("scores", scores(result)), ("differences", differences(result))):
        text = rewrite(text, name, table)
    PAGE.write_text(text)
    sys.stderr.write(f"wrote {PAGE}\n")
