"""How the cost of a step grows with questions, tokens and parameters, and that of a plan with the pool.

For each of them runs of 1x, 2x and 4x the size of A take steps in turn in one process. The exponent is the
slope of log CPU-seconds over log size: 1 is proportional, below 1 part of the cost is fixed. Sampling is what
comes before the groups are scored, the rest is the update and the engine.

    python benchmarks/growth.py                  # about 10 minutes, 5 GB of disk for the pool of a million
    python benchmarks/growth.py --what tokens --repeats 20
    python benchmarks/growth.py --json           # last line: {"questions": {"step": exponent, ...}, ...}
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from selection import SELECTORS
from selection import measure as measure_plans
from step import RECIPE, TINY_RATE, WARM_UP_STEPS, Turns
from workloads import WORKLOADS, Workload, use_one_thread, write

BASE = WORKLOADS["A"]
SIZES: dict[str, list[tuple[float, Workload]]] = {
    "questions": [(size, replace(BASE, num_questions=size)) for size in (8, 16, 32)],
    "tokens": [(size, replace(BASE, max_completion_tokens=size)) for size in (32, 64, 128)],
    "prompt": [(size, replace(BASE, prompt_tokens=size)) for size in (64, 128, 256)],
    "width": [
        (12 * 4 * size**2, replace(BASE, hidden_size=size, num_heads=size // 32, intermediate_size=3 * size))
        for size in (128, 192, 256)
    ],
    "layers": [(size, replace(BASE, num_layers=size)) for size in (4, 8, 16)],
}
"""Sizes, the width's as its weights, and workloads."""
POOLS = (10_000, 100_000, 1_000_000)


@dataclass(slots=True)
class Side:
    """The run of one size."""

    workload: Workload
    place: int
    is_loaded: Event = field(default_factory=Event)
    sampled: list[float] = field(default_factory=list)
    """CPU-seconds of each step until its groups were scored."""


def run(side: Side, folder: Path, steps: int, turns: Turns) -> None:
    """Train, a step at each turn."""
    from dteframe import hookimpl
    from dteframe.engine.run import run_recipe
    from dteframe.recipe import load_recipe
    from dteframe.registry import load_registry

    class Watch:
        @hookimpl
        def dteframe_groups_scored(self, groups) -> None:  # type: ignore[no-untyped-def]  # imported late
            side.sampled.append(turns.seconds_so_far())

        @hookimpl
        def dteframe_step_finished(self, report) -> None:  # type: ignore[no-untyped-def]  # imported late
            if report.step:
                turns.step_ended(side.place, report.step == steps)
            else:
                side.is_loaded.set()
                turns.begin(side.place)

    workload = side.workload
    write(workload, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            steps=steps,
            rate=TINY_RATE,
            folder=folder,
            num_questions=workload.num_questions,
            num_generations=workload.num_generations,
            max_completion_tokens=workload.max_completion_tokens,
        )
    )
    registry = load_registry([Path(__file__).with_name("hash_reward.py")])
    registry.hooks.register(Watch())
    try:
        run_recipe(load_recipe(recipe, [], registry), registry, folder / "runs", resume=False)
    except BaseException:
        turns.fail()
        side.is_loaded.set()
        raise


def measure_steps(workloads: Sequence[Workload], repeats: int) -> dict[str, list[list[float]]]:
    """Give CPU-seconds by size and step: of the whole, of sampling, and of the rest."""
    steps, turns = WARM_UP_STEPS + repeats, Turns(len(workloads))
    sides = [Side(workload, place) for place, workload in enumerate(workloads)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(sides)) as threads:
        futures = []
        for side in reversed(sides):  # the first one takes the first step as soon as it is loaded
            folder = Path(name) / str(side.place)
            folder.mkdir()
            futures.append(threads.submit(run, side, folder, steps, turns))
            side.is_loaded.wait()  # models are loaded one after another
        for error in filter(None, [future.exception() for future in futures]):
            raise error
    wholes = [seconds[WARM_UP_STEPS:] for seconds in turns.seconds]
    before = [side.sampled[WARM_UP_STEPS:] for side in sides]
    rest = [
        [whole - part for whole, part in zip(*pair, strict=True)] for pair in zip(wholes, before, strict=True)
    ]
    return {"step": wholes, "sampling": before, "update": rest}


def measure_pools(repeats: int) -> dict[str, list[list[float]]]:
    """Give CPU-seconds of plans by size of the pool, and of the bare products beside them."""
    found = []
    for size in POOLS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure_plans(Path(folder), size, None, repeats))
    plans = [
        [one + other for one, other in zip(item.predict, item.select[SELECTORS[0]], strict=True)]
        for item in found
    ]
    return {"plan": plans, "bare product": [item.products for item in found]}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit log seconds over log size by least squares."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in seconds]).slope


def main() -> None:
    """Measure, tell as it goes on stderr, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=(*SIZES, "pool"), action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each size after the warm-up")
    parser.add_argument("--json", action="store_true", help="exponents as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    import torch

    torch.set_num_threads(1)
    exponents: dict[str, dict[str, float]] = {}
    sys.stdout.write(f"{'':24}{'seconds':>27}{'1x-2x':>8}{'2x-4x':>8}{'exponent':>10}{'quartiles':>12}\n")
    for what in options.what or [*SIZES, "pool"]:
        sys.stderr.write(f"{what}\n")
        if what == "pool":
            sizes: list[float] = list(POOLS)
            parts = measure_pools(options.repeats)
        else:
            sizes = [size for size, _ in SIZES[what]]
            parts = measure_steps([workload for _, workload in SIZES[what]], options.repeats)
        for name, seconds in parts.items():
            medians = [statistics.median(of_size) for of_size in seconds]
            rounds = [slope(sizes, one_round) for one_round in zip(*seconds, strict=True)]
            low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
            exponents.setdefault(what, {})[name] = middle
            halves = [slope(sizes[first : first + 2], medians[first : first + 2]) for first in (0, 1)]
            shown = "".join(f"{value:9.3f}" for value in medians)
            sys.stdout.write(
                f"{what:11}{name:13}{shown}{halves[0]:8.2f}{halves[1]:8.2f}{middle:10.2f}"
                f"{f'{low:.2f}-{high:.2f}':>12}\n"
            )
        sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(exponents) + "\n")


if __name__ == "__main__":
    main()
