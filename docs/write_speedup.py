"""Keep what docs/speedup.md rests on, and write its tables and figures.

    python docs/write_speedup.py [RUNS ...]      # `make speedup` calls it with runs/speedup_cpu

RUNS are folders of sweeps. What ``dteframe compare`` reads of them is put into docs/data under the folder's
name, without what it does not read; the tables are made from there, so that anyone makes them again:
dteframe compare docs/data/speedup_cpu
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from dteframe.experiments.run_curves import read_runs
from dteframe.experiments.sweep_jobs import SWEEP_FILE

DOCS = Path(__file__).parent
PAGE, KEPT, PLOTS = DOCS / "speedup.md", DOCS / "data", DOCS / "plots"
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
    """Put the small part of every complete run where it is committed.

    What is kept already and not among these runs stays, if it belongs to them: a sweep may go on where the
    folders of its earlier runs are not. Otherwise nothing is written.
    """
    kept = KEPT.resolve() / runs.name
    if kept == runs.resolve():
        sys.exit(f"{runs}: is what is kept; name the folder of the runs themselves")
    read = read_runs([runs])
    complete = [curve.name for curve in read.curves]
    if not complete:
        sys.exit(f"{runs}: no run is complete there; finish some")
    described = json.loads((runs / SWEEP_FILE).read_text(encoding="utf-8"))
    variants = {run["name"]: run["variants"] for run in described["runs"]}
    earlier = sorted({path.parent.name for path in kept.glob("*/metrics.jsonl")} - set(complete))
    for name in earlier:
        likes = [other for other in complete if variants[other] == variants.get(name)]
        if not any(_recipe(runs / other) == _recipe(kept / name) for other in likes):
            sys.exit(
                f"{runs}: {name} is kept and not complete there, and no complete run has its recipe but for "
                f"the seed; finish it or another seed of it, or delete {kept} to begin anew"
            )
    described["runs"] = [run for run in described["runs"] if run["name"] in {*complete, *earlier}]
    with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
        for name in earlier:
            shutil.copytree(kept / name, Path(fresh) / name)
        for name in complete:
            source, folder = runs / name, Path(fresh) / name
            folder.mkdir()
            lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.dumps(row) for row in shortened([json.loads(line) for line in lines])]
            (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
            (folder / "recipe.yaml").write_bytes((source / "recipe.yaml").read_bytes())
        (Path(fresh) / SWEEP_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        if kept.exists():
            shutil.rmtree(kept)
        shutil.copytree(fresh, kept)
    sys.stdout.writelines(f"left out: {reason}\n" for reason in read.left_out)


def _recipe(run: Path) -> dict[str, object]:
    """Read what a run shares with the other seeds of its arm."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in recipe.items() if key not in ("name", "seed")}


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


def check_page(names: Sequence[str]) -> None:
    """End with what is missing where the page has no section for a sweep."""
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in page or end not in page:
            sys.exit(
                f"{PAGE}: has no place for {name}; add these two lines where its tables go:\n{begin}\n{end}"
            )


def write_page() -> None:
    """Put the comparison of every sweep that is kept into the page, and its figures beside it."""
    page = PAGE.read_text(encoding="utf-8")
    for sweep in sorted(path.parent for path in KEPT.glob(f"*/{SWEEP_FILE}")):
        shutil.rmtree(PLOTS / sweep.name, ignore_errors=True)
        plots = ["--plots", str(PLOTS / sweep.name)]
        command = [sys.executable, "-m", "dteframe", "compare", str(sweep), *plots]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        tables = told[told.index("target:") :]
        begin, end = BEGIN.format(sweep.name), END.format(sweep.name)
        before, after = page[: page.index(begin)], page[page.index(end) :]
        lines = "\n".join(f"    {line}".rstrip() for line in tables.strip().splitlines())
        page = f"{before}{begin}\n\n{lines}\n\n{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sweeps = [Path(name).resolve() for name in sys.argv[1:]]
    check_page(
        [*(sweep.name for sweep in sweeps), *(path.parent.name for path in KEPT.glob(f"*/{SWEEP_FILE}"))]
    )
    for sweep in sweeps:
        keep(sweep)
    write_page()
