"""What a step spends outside model, reward and reading data: the engine's share, at most 2 % of E.

A run with everything switched on (reference questions, attention, difficulty targeting, replay, all trackers)
is sampled as it goes: every few milliseconds of CPU time a signal looks which function runs, and the time
since the last look counts for the folder of its file; Python's own files and numpy's count for their callers.
What other threads take, which write files, counts for the engine too.

    python benchmarks/engine_share.py                    # E, about 3 minutes
    python benchmarks/engine_share.py --workload A --steps 100
    python benchmarks/engine_share.py --json             # last line: {"E": share, ...}
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from workloads import WORKLOADS, Workload, use_one_thread, write

WARM_UP_STEPS, POOL_SIZE, BAR = 3, 2000, 0.02
RECIPE = """\
name: share
training:
  max_steps: {steps}
  questions_per_step: {num_questions}
  num_generations: {num_generations}
  success_threshold: 0.5
  learning_rate: 1e-12
  optim: adamw_torch_fused
  evaluate_every: 0
  evaluation_size: 0
  checkpoint_every: 0
  selection_interval: 2
  fresh_fraction: 0.5
  micro_batch_tokens: 32768
  reward_workers: 0
  device: cpu
model: {{type: pretrained, path: {folder}/model}}
dataset: {{type: files, path: {folder}/questions.jsonl, chat: false}}
reward: {{type: hash_reward}}
estimator: {{type: attention, reference_size: {num_questions}}}
selector: {{type: difficulty_target}}
replay: {{type: fifo}}
rollout: {{type: transformers, max_completion_length: {max_completion_tokens}}}
objective: {{type: grpo, loss_type: dapo, scale_rewards: group}}
tracker: [{{type: jsonl}}, {{type: tensorboard}}, {{type: console}}]
"""
ENGINE = "engine"
MODEL, REWARD = "model", "reward"
OWNERS = {
    "dteframe/rollouts/": MODEL,
    "dteframe/models/": MODEL,
    "dteframe/engine/logprobs.py": MODEL,
    "dteframe/engine/shared_attention.py": MODEL,
    "benchmarks/hash_reward.py": REWARD,
    "benchmarks/workloads.py": REWARD,
    "dteframe/rewards/": REWARD,
    "dteframe/": ENGINE,
    "site-packages/torch/utils/tensorboard/": ENGINE,
    "site-packages/tensorboard/": ENGINE,
    "site-packages/torch/": MODEL,
    "site-packages/transformers/": MODEL,
    "site-packages/tokenizers/": MODEL,
}
"""Whose a file is; the first that its path holds."""
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(slots=True)
class Looks:
    """CPU-seconds by owner and by function of the engine, and the run's own stage times."""

    owners: Counter[str] = field(default_factory=Counter)
    functions: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, float]] = field(default_factory=list)
    """Metrics."""
    _thread_seconds: float = 0.0
    _process_seconds: float = 0.0

    def begin(self) -> None:
        """Start looking."""
        self._thread_seconds, self._process_seconds = time.thread_time(), time.process_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS)

    def end(self) -> None:
        """Stop looking, and add what other threads took."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        others = time.process_time() - self._process_seconds - sum(self.owners.values())
        self.owners[ENGINE] += others
        self.functions["other threads"] = others

    def _look(self, number: int, frame: FrameType | None) -> None:
        now = time.thread_time()
        seconds, self._thread_seconds = now - self._thread_seconds, now
        while frame is not None and (owner := owner_of(frame.f_code.co_filename)) is None:
            frame = frame.f_back
        if frame is None:
            owner, where = ENGINE, "elsewhere"
        else:
            path = frame.f_code.co_filename
            where = f"{'/'.join(Path(path).parts[-2:])} {frame.f_code.co_name}"
        self.owners[owner] += seconds
        if owner == ENGINE:
            self.functions[where] += seconds


def owner_of(path: str) -> str | None:
    """Say whose time it is while a function of that file runs; None is its caller's."""
    return next((owner for part, owner in OWNERS.items() if part in path), None)


def run(workload: Workload, steps: int, folder: Path) -> Looks:
    """Train, and look at the steps after the first few."""
    from dteframe import hookimpl
    from dteframe.engine.run import run_recipe
    from dteframe.recipe import load_recipe
    from dteframe.registry import load_registry

    looks = Looks()

    class Watch:
        @hookimpl(trylast=True)
        def dteframe_step_finished(self, report) -> None:  # type: ignore[no-untyped-def]  # imported late
            if report.step > WARM_UP_STEPS:
                looks.steps.append(report.metrics())
            if report.step == WARM_UP_STEPS:
                looks.begin()
            if report.step == steps:
                looks.end()

    write(replace(workload, num_questions=POOL_SIZE), folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            steps=steps,
            folder=folder,
            num_questions=workload.num_questions,
            num_generations=workload.num_generations,
            max_completion_tokens=workload.max_completion_tokens,
        )
    )
    registry = load_registry([Path(__file__).with_name("hash_reward.py")])
    registry.hooks.register(Watch())
    run_recipe(load_recipe(recipe, [], registry), registry, folder / "runs", resume=False)
    return looks


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: E")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--functions", type=int, default=12, help="of the engine, to be shown")
    parser.add_argument("--json", action="store_true", help="shares as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    import torch

    torch.set_num_threads(1)
    shares: dict[str, float] = {}
    for name in options.workload or ["E"]:
        with tempfile.TemporaryDirectory() as folder:
            looks = run(WORKLOADS[name], WARM_UP_STEPS + options.steps, Path(folder))
        total, count = sum(looks.owners.values()), len(looks.steps)
        sys.stdout.write(f"{name} {WORKLOADS[name].description}: {total / count:.3f} CPU-s a step\n")
        step = statistics.fmean(row["time/step_seconds"] for row in looks.steps)
        for key in sorted({key for row in looks.steps for key in row if key.startswith("time/")}):
            seconds = statistics.fmean(row.get(key, 0.0) for row in looks.steps)
            label = key.removeprefix("time/").removesuffix("_seconds")
            sys.stdout.write(f"  wall-clock of {label:12}{1000 * seconds:9.1f} ms {seconds / step:7.2%}\n")
        rows = [*looks.owners.most_common(), *looks.functions.most_common(options.functions)]
        for where, seconds in rows:
            indent = "  " if where in looks.owners else "    "
            sys.stdout.write(f"{indent}{1000 * seconds / count:8.2f} ms {seconds / total:7.2%}  {where}\n")
        shares[name] = looks.owners[ENGINE] / total
        sys.stdout.write(f"{name}: the engine's share is {shares[name]:.2%} (bar {BAR:.0%})\n")
    if options.json:
        sys.stdout.write(json.dumps(shares) + "\n")


if __name__ == "__main__":
    main()
