"""Keep what docs/speedup.md rests on, and write its tables and figures.

    python docs/write_speedup.py [RUNS]      # `make speedup` calls it with runs/speedup_cpu

What ``dteframe compare`` reads of the runs is put into docs/data/speedup, without what it does not read; the
tables are made from there, so that anyone makes them again: dteframe compare docs/data/speedup
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).parent
PAGE, KEPT, PLOTS = DOCS / "speedup.md", DOCS / "data" / "speedup", DOCS / "plots"
BEGIN, END = "<!-- {}: written by docs/write_speedup.py -->", "<!-- end of {} -->"
STEPS_OF_A_ROW = 10
OF_A_STEP = ("answer/informative_fraction", "answer/predicted_pearson")
AT_AN_EVALUATION = (
    "evaluation/success_rate",
    "evaluation/standard_error",
    "cost/training_seconds",
    "cost/training_cpu_seconds",
    "cost/train_tokens",
    "cost/reference_tokens",
    "cost/train_rollouts",
    "cost/reference_rollouts",
)
DIGITS = 5


def keep(runs: Path) -> None:
    """Put the small part of every finished run where it is committed."""
    described = json.loads((runs / "sweep.json").read_text(encoding="utf-8"))
    KEPT.mkdir(parents=True, exist_ok=True)
    finished = [run for run in described["runs"] if (runs / run["name"] / "summary.json").is_file()]
    for run in finished:
        source, folder = runs / run["name"], KEPT / run["name"]
        folder.mkdir(exist_ok=True)
        lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.dumps(row) for row in shortened([json.loads(line) for line in lines])]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_bytes((source / "recipe.yaml").read_bytes())
    described["runs"] = finished
    (KEPT / "sweep.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def shortened(rows: Sequence[Mapping[str, float]]) -> Iterator[dict[str, float]]:
    """Give a row per evaluation, its times those since the last one, and means over ten steps between.

    A run's mean over its steps stays what it was where the number of steps is a multiple of ten.
    """
    seconds: dict[str, float] = {}
    waiting: list[Mapping[str, float]] = []
    for row in rows:
        for key, value in row.items():
            if key.startswith("time/"):
                seconds[key] = seconds.get(key, 0.0) + (value or 0.0)
        if row["step"]:
            waiting.append(row)
        short: dict[str, float] = {"step": row["step"]}
        if len(waiting) == STEPS_OF_A_ROW:
            for key in OF_A_STEP:
                known = [item[key] for item in waiting if item.get(key) is not None]
                if known:
                    short[key] = sum(known) / len(known)
            waiting = []
        if "evaluation/success_rate" in row:
            short |= {key: row[key] for key in AT_AN_EVALUATION} | seconds
            seconds = {}
        if len(short) > 1:
            yield {key: _rounded(value) for key, value in short.items()}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) or value is None else float(f"{value:.{DIGITS}g}")


def write_page() -> None:
    """Put the comparison into the page, and its figures beside it."""
    command = [sys.executable, "-m", "dteframe", "compare", str(KEPT), "--plots", str(PLOTS)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    tables = told[told.index("target:") :]
    page = PAGE.read_text(encoding="utf-8")
    begin, end = BEGIN.format("comparison"), END.format("comparison")
    before, after = page[: page.index(begin)], page[page.index(end) :]
    lines = "\n".join(f"    {line}".rstrip() for line in tables.strip().splitlines())
    PAGE.write_text(f"{before}{begin}\n\n{lines}\n\n{after}", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
    write_page()
