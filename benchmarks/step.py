"""CPU-seconds of a training step, ours over TRL's with transformers' generate, step by step in turn.

Both sides run in one process: TRL's trainer in one thread and ``run_recipe`` in another, and each waits while
the other takes a step. So a pair of steps meets the same machine, and the ratio of a pair is what counts.

    python benchmarks/step.py                      # all workloads, about 5 minutes
    python benchmarks/step.py --workload D --repeats 30
    python benchmarks/step.py --json               # last line: {"A": ratio, ..., "geometric_mean": ratio}
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workloads import WORKLOADS, Workload, reward_of, use_one_thread

WARM_UP_STEPS = 2
BARS = {"A": 0.92, "B": 0.60, "C": 0.40, "D": 0.35, "E": 0.95}
TINY_RATE = 1e-12
"""Learning rate: the optimizer does all its work and the lengths stay as they are."""
RECIPE = """\
name: ours
training:
  max_steps: {steps}
  questions_per_step: {num_questions}
  num_generations: {num_generations}
  learning_rate: {rate}
  optim: adamw_torch_fused
  evaluate_every: 0
  evaluation_size: 0
  checkpoint_every: 0
  selection_interval: 1
  micro_batch_tokens: 32768
  reward_workers: 0
  device: cpu
model: {{type: pretrained, path: {folder}/model}}
dataset: {{type: files, path: {folder}/questions.jsonl, chat: false}}
reward: {{type: hash_reward}}
rollout: {{type: transformers, max_completion_length: {max_completion_tokens}}}
objective: {{type: grpo, loss_type: dapo, scale_rewards: group}}
tracker: [{{type: jsonl}}]
"""


class Turns:
    """Threads that take steps in turn, and the CPU-seconds of each step."""

    def __init__(self, num_sides: int = 2) -> None:
        """Begin with the first side."""
        self.seconds: tuple[list[float], ...] = tuple([] for _ in range(num_sides))
        self.tokens: tuple[list[float], ...] = tuple([] for _ in range(num_sides))
        """Mean completion tokens of each step."""
        self._may_go = [threading.Semaphore(0) for _ in range(num_sides)]
        self._since = 0.0
        self._has_failed = False

    def begin(self, side: int) -> None:
        """Wait for the first turn."""
        if side:
            self._wait(side)

    def scored(self, side: int) -> None:
        """Hear that the completions of a step have their rewards: its update comes next."""

    def step_ended(self, side: int, is_last: bool) -> None:
        """Note a step, let the other sides take one each, and wait for them."""
        self.seconds[side].append(self.seconds_so_far())
        self._may_go[(side + 1) % len(self._may_go)].release()
        if not is_last:
            self._wait(side)

    def seconds_so_far(self) -> float:
        """Give the CPU-seconds of the step that is being taken."""
        return time.process_time() - self._since

    def fail(self) -> None:
        """Let nobody wait for a side that has failed."""
        self._has_failed = True
        for semaphore in self._may_go:
            semaphore.release()

    def _wait(self, side: int) -> None:
        self._may_go[side].acquire()
        if self._has_failed:
            raise RuntimeError("the other side has failed")
        self._since = time.process_time()


def run_trl(workload: Workload, folder: Path, steps: int, turns: Turns) -> None:
    """Train with TRL's GRPOTrainer."""
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": row["question"], "kind": row["answer"]} for row in rows])

    def reward(prompts: list[str], completions: list[str], kind: list[str], **_: object) -> list[float]:
        triples = zip(prompts, completions, kind, strict=True)
        rewards = [reward_of(prompt, completion, which == "equal") for prompt, completion, which in triples]
        turns.scored(0)
        return rewards

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):  # type: ignore[no-untyped-def]  # transformers'
            turns.tokens[0].extend(logs[key] for key in ("completions/mean_length",) if key in logs)

        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]  # transformers'
            turns.step_ended(0, state.global_step == steps)

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=workload.num_questions * workload.num_generations,
        num_generations=workload.num_generations,
        max_completion_length=workload.max_completion_tokens,
        max_steps=steps,
        learning_rate=TINY_RATE,
        lr_scheduler_type="constant",
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    turns.begin(0)
    trainer.train()


def run_ours(workload: Workload, folder: Path, steps: int, turns: Turns) -> None:
    """Train with ``run_recipe``."""
    from dteframe import hookimpl
    from dteframe.engine.run import run_recipe
    from dteframe.recipe import load_recipe
    from dteframe.registry import load_registry

    class Watch:
        @hookimpl
        def dteframe_groups_scored(self, groups) -> None:  # type: ignore[no-untyped-def]  # imported late
            turns.scored(1)

        @hookimpl
        def dteframe_step_finished(self, report) -> None:  # type: ignore[no-untyped-def]  # imported late
            if report.step:
                turns.tokens[1].append(report.metrics()["answer/completion_length_mean_tokens"])
                turns.step_ended(1, report.step == steps)

    turns.begin(
        1
    )  # Before loading: while transformers loads, another thread's tensors may be born without memory.
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
    run_recipe(load_recipe(recipe, [], registry), registry, folder / "runs", resume=False)


def measure(workload: Workload, repeats: int) -> Turns:
    """Let both sides take their steps."""
    from workloads import write

    steps, turns = WARM_UP_STEPS + repeats, Turns()

    def guarded(run: Callable[[Workload, Path, int, Turns], None], folder: Path) -> None:
        try:
            run(workload, folder, steps, turns)
        except BaseException:
            turns.fail()
            raise

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        write(workload, Path(name))
        for done in [pool.submit(guarded, run, Path(name)) for run in (run_trl, run_ours)]:
            done.result()
    return turns


def main() -> None:
    """Measure, tell as it goes on stderr, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=10, help="pairs of steps after the warm-up")
    parser.add_argument("--json", action="store_true", help="ratios as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    import torch

    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    names = options.workload or list(WORKLOADS)
    sys.stdout.write(
        f"{'':42}{'tokens':>12}{'TRL s':>9}{'ours s':>9}{'ratio':>7}{'quartiles':>14}{'bar':>6}\n"
    )
    for number, name in enumerate(names, start=1):
        sys.stderr.write(f"[{number}/{len(names)}] {name}: {WORKLOADS[name].description}\n")
        turns = measure(WORKLOADS[name], options.repeats)
        trl, ours = (seconds[WARM_UP_STEPS:] for seconds in turns.seconds)
        tokens = [statistics.fmean(means) for means in turns.tokens]
        of_pairs = sorted(ours_step / trl_step for trl_step, ours_step in zip(trl, ours, strict=True))
        low, ratios[name], high = statistics.quantiles(of_pairs, n=4, method="inclusive")
        spread, lengths = f"{low:.2f}-{high:.2f}", f"{tokens[0]:.1f} {tokens[1]:.1f}"
        sys.stdout.write(
            f"{name} {WORKLOADS[name].description[:39]:40}{lengths:>12}{statistics.median(trl):9.3f}"
            f"{statistics.median(ours):9.3f}{ratios[name]:7.2f}{spread:>14}{BARS[name]:6.2f}\n"
        )
        sys.stdout.flush()
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios.values()))
    sys.stdout.write(f"{'geometric mean':72}{mean:7.2f}\n")
    if options.json:
        sys.stdout.write(json.dumps(ratios | {"geometric_mean": mean}) + "\n")


if __name__ == "__main__":
    main()
