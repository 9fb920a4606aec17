"""Kill a tiny run with SIGKILL at random moments, resume it, and compare it with the run that was let be.

``python tests/faults/kill.py --trials 200 --out killed.jsonl`` writes a line per trial and prints the counts.
A third of the kills come after a random time, a third in a random stage, a third at a random event of a file
in the run folder: when it is opened, renamed or removed, so also between the files of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import TINY

from dteframe.engine.checkpoint_folder import newest_checkpoint
from dteframe.experiments.verify_resume import PRELOADED, first_difference

OVERRIDES = ("training.save_total_limit=2",)
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
SECONDS_AT_MOST = 120.0
SECONDS_OF_A_STAGE = 0.01


@dataclass(frozen=True, slots=True)
class Kill:
    """Where a run was killed, and from where it went on."""

    stage: str
    """Of the meter, or what stands before and behind the stages."""
    by: str
    """``time``, ``stage`` or ``file``."""
    resumed_from: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A run that was killed once or more often, and what came of it."""

    seed: int
    kills: tuple[Kill, ...]
    difference: str | None
    """From the run that was let be."""


@dataclass(frozen=True, slots=True)
class LetBe:
    """The run that was let be: what others are compared with, and how long it took."""

    folder: Path
    seconds: float
    num_stages: int
    num_file_events: int


@dataclass(frozen=True, slots=True)
class At:
    """An event at which a run kills itself."""

    by: str
    number: int
    seconds_later: float


def let_be(folder: Path) -> LetBe:
    """Do the run once, without a fault."""
    for name in ("first", "whole"):  # The first waits for imports.
        began = time.perf_counter()
        process, notes = _start(folder / name, None)
        process.join(SECONDS_AT_MOST)
        assert process.exitcode == 0, _said(folder / name)
    num_stages, num_file_events = map(int, notes.read_text().split()[:2])
    return LetBe(folder / "whole/runs/tiny", time.perf_counter() - began, num_stages, num_file_events)


def trial(folder: Path, whole: LetBe, seed: int) -> Trial:
    """Kill a run, resume it, perhaps kill it again, and compare."""
    rng = random.Random(seed)
    kills: list[Kill] = []
    num_kills = rng.choice((1, 1, 1, 2))
    run_folder = folder / "runs" / "tiny"
    while True:
        by = rng.choice(("time", "stage", "file")) if len(kills) < num_kills else None
        at = None
        if by == "stage":
            at = At(by, rng.randint(1, whole.num_stages), rng.expovariate(1 / SECONDS_OF_A_STAGE))
        elif by == "file":
            at = At(by, rng.randint(1, whole.num_file_events), 0.0)
        process, notes = _start(folder, at)
        process.join(rng.uniform(0, whole.seconds) if by == "time" else SECONDS_AT_MOST)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        stage = " ".join(notes.read_text().split()[2:]) if notes.exists() else "starting"
        if process.exitcode != -signal.SIGKILL or by is None:
            return Trial(seed, tuple(kills), f"exit code {process.exitcode}: {_said(folder)}")
        found = newest_checkpoint(run_folder, lambda warning: None)
        kills.append(Kill(stage, by, found.name if found else "the start"))
    return Trial(seed, tuple(kills), first_difference(whole.folder, run_folder))


def _start(folder: Path, at: At | None):
    """Start, or resume, the run in a process that has everything imported."""
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "notes.txt"
    notes.unlink(missing_ok=True)
    process = processes.Process(target=_run, args=(folder, at))
    process.start()
    return process, notes


def _run(folder: Path, at: At | None) -> None:
    os.environ["DTEFRAME_CACHE"] = str(folder / "cache")
    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 2)
    with _watched(folder, at):
        from dteframe.engine.run import run_recipe
        from dteframe.recipe import load_recipe
        from dteframe.registry import load_registry

        recipe = folder / "tiny.yaml"
        recipe.write_text(TINY)
        registry = load_registry([], near=recipe)
        run_recipe(load_recipe(recipe, OVERRIDES, registry), registry, folder / "runs", True)


@contextmanager
def _watched(folder: Path, at: At | None) -> Iterator[None]:
    """Note the stage that the run is in, and kill it at an event of a file."""
    from dteframe.engine.meter import Meter

    notes = os.open(folder / "notes.txt", os.O_CREAT | os.O_RDWR)
    inside = str(folder / "runs")
    stage, counts = "starting", {"stage": 0, "file": 0}

    def note(event: str | None = None) -> None:
        if event is not None:
            counts[event] += 1
        os.pwrite(notes, f"{counts['stage']:6d} {counts['file']:6d} {stage:<40}".encode(), 0)
        if at is not None and event == at.by and counts[event] == at.number:
            if at.seconds_later == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(at.seconds_later, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(inside):
            note("file")

    timed = Meter.stage

    @contextmanager
    def noting(meter: Meter, name: str) -> Iterator[None]:
        nonlocal stage
        stage = name
        note("stage")
        with timed(meter, name):
            yield
        stage = "between stages"
        note()

    Meter.stage = noting
    note()
    sys.addaudithook(hear)
    yield


def _said(folder: Path) -> str:
    return (folder / "said.txt").read_text()[-500:]


def kill_many(folder: Path, seeds: range) -> Iterator[Trial]:
    """Do a trial for every seed; the folders of those that differ are left."""
    whole = let_be(folder)
    for seed in seeds:
        place = folder / f"trial_{seed}"
        place.mkdir()
        shutil.copytree(folder / "whole" / "cache", place / "cache")
        done = trial(place, whole, seed)
        yield done
        if done.difference is None:
            shutil.rmtree(place)


def main() -> None:
    """Do the trials and print the counts as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON line per trial")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_"))
    stages: Counter[str] = Counter()
    starts: Counter[str] = Counter()
    wrong = []
    for done in kill_many(folder, range(options.first_seed, options.first_seed + options.trials)):
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(asdict(done)) + "\n")
        stages.update(kill.stage for kill in done.kills)
        starts.update(kill.resumed_from for kill in done.kills)
        wrong += [done] if done.difference else []
    sys.stdout.write(f"{options.trials} runs killed {stages.total()} times; {len(wrong)} differ\n")
    for title, counts in (("killed in", stages), ("resumed from", starts)):
        for name, count in counts.most_common():
            sys.stdout.write(f"{title:<14}{name:<20}{count:>5}\n")
    for done in wrong:
        sys.stdout.write(f"seed {done.seed}: {done.difference} ({done.kills})\n")
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
