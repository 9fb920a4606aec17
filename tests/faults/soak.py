"""Let a tiny run with every feature go on for long, and see that nothing grows: memory, open files, threads.

``python tests/faults/soak.py --steps 2000 --folder DIR`` prints what it measured, beside the disk use that
``dteframe plan`` foretells, and ends with 1 if something has grown.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import TINY

from dteframe import hookimpl
from dteframe.disk_plan import disk_plan
from dteframe.engine.run import run_recipe
from dteframe.memory import in_words
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry
from dteframe.reports import StepReport

OVERRIDES = (
    "name=soak",
    "training.evaluate_every=50",
    "training.checkpoint_every=20",
    "training.max_prompt_length=16",
    "training.reward_workers=1",
    "model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}",
    "rollout.canary_every=50",
    "objective.beta=0.01",
    "selector.cooldown=2",
    "selector.coverage_fraction=0.1",
    "tracker=[{type: jsonl}, {type: tensorboard}]",
)
FIRST_STEPS = 200
"""After which nothing may grow."""
MOST_GROWTH = 0.05
EVERY = 20


class Watch:
    """Takes the measures of this process after every few steps."""

    def __init__(self) -> None:
        self.resident: dict[int, int] = {}
        self.files: dict[int, int] = {}
        self.threads: dict[int, int] = {}

    @hookimpl
    def dteframe_step_finished(self, report: StepReport) -> None:
        if report.step % EVERY:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident[report.step] = pages * os.sysconf("SC_PAGE_SIZE")
        self.files[report.step] = len(os.listdir("/proc/self/fd"))
        self.threads[report.step] = len(os.listdir("/proc/self/task"))


def soak(folder: Path, steps: int) -> tuple[Watch, dict[str, int], dict[str, int]]:
    """Do the run; give what was measured, the folder's bytes by part, and what was foretold."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    registry = load_registry([], near=recipe)
    loaded = load_recipe(recipe, [*OVERRIDES, f"training.max_steps={steps}"], registry)
    watch = Watch()
    registry.hooks.register(watch)
    run_recipe(loaded, registry, folder / "runs", True)
    sizes = loaded.recipe.model.sizes()
    assert sizes is not None
    plan = disk_plan(loaded.recipe, sizes)
    return watch, dict(sizes_of(folder / "runs" / "soak")), dict(plan.parts)


def sizes_of(run_folder: Path) -> dict[str, int]:
    """Add up a run folder's bytes, by what stands first in it."""
    parts: dict[str, int] = {}
    for path in run_folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(run_folder).parts[0]
            parts[name] = parts.get(name, 0) + path.stat().st_size
    return parts


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    if options.steps < FIRST_STEPS + EVERY:
        parser.error(f"--steps: at least {FIRST_STEPS + EVERY}, for what is measured begins at {FIRST_STEPS}")
    options.folder.mkdir(parents=True, exist_ok=True)
    watch, written, foretold = soak(options.folder, options.steps)
    lines, failed = [], []
    for title, series in (("memory", watch.resident), ("files", watch.files), ("threads", watch.threads)):
        after = {step: value for step, value in series.items() if step >= FIRST_STEPS}
        first, most, last = after[min(after)], max(after.values()), after[max(after)]
        bound = first * (1 + MOST_GROWTH) if title == "memory" else first
        if most > bound:
            failed.append(title)
        shown = [in_words(value) if title == "memory" else str(value) for value in (first, most, last)]
        lines.append(f"{title:<10}at step {min(after)} {shown[0]}, at most {shown[1]}, at the end {shown[2]}")
    whole, plan = sum(written.values()), sum(foretold.values())
    lines.append(f"disk      {in_words(whole)}, foretold {in_words(plan)} ({plan / whole:.2f} of it)")
    lines += [f"  {name:<20}{size:>12,}" for name, size in sorted(written.items())]
    lines += [f"  foretold: {name:<20}{size:>12,}" for name, size in foretold.items()]
    if not 0.8 <= plan / whole <= 1.2:
        failed.append("disk")
    lines.append(f"failed: {', '.join(failed)}" if failed else "nothing has grown")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
