"""What rewards cost in worker processes beside the same in the run's own process, and what sampling hides.

The first table has CPU-seconds, of the worker too, of scoring 512 completions both ways in turn; then comes
the wall-clock of sampling and scoring one after the other, and of scoring while sampling goes on.

    python benchmarks/rewards.py            # about 3 minutes
    python benchmarks/rewards.py --json     # last line: {"math_verify": ratio, ..., "hidden_fraction": share}
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from workloads import WORKLOADS, prompts_of, use_one_thread, write

if TYPE_CHECKING:
    from dteframe import Completion, Question
    from dteframe.engine.reward_pool import RewardPool, Scorer

NUM_QUESTIONS, NUM_GENERATIONS = 64, 8
NUM_TOKENS = 200
REWARDS = {"math_verify": {}, "exact_match": {"answer_pattern": r"boxed\{(.*)\}"}}
"""Of the second kind a comparison takes microseconds: it shows what a worker itself costs."""
BAR = 1.03

Group = tuple["Question", list["Completion"]]


def math_groups(seed: int) -> list[Group]:
    """Make questions answered by fractions, roots and the like; half of the completions are right."""
    import numpy as np

    from dteframe import Completion, Question

    chance = random.Random(seed)

    def answer() -> str:
        one, other = chance.randint(2, 999), chance.randint(2, 999)
        forms = (
            f"\\frac{{{one}}}{{{other}}}",
            f"{one}\\sqrt{{{other}}}",
            f"({one}, {other})",
            f"x^2+{one}x-{other}",
        )
        return chance.choice(forms)

    groups = []
    for number in range(NUM_QUESTIONS):
        gold = answer()
        question = Question(f"{seed}-{number}", "?", "?", gold)
        completions = []
        for _ in range(NUM_GENERATIONS):
            said = gold if chance.random() < 0.5 else answer()
            text = "Let us see, step by step. " * 20 + f"So the answer is $\\boxed{{{said}}}$."
            token_ids = np.arange(NUM_TOKENS, dtype=np.int64)
            completions.append(Completion(token_ids, np.zeros(NUM_TOKENS, dtype=np.float32), "stop", text))
        groups.append((question, completions))
    return groups


@contextmanager
def pool_of(name: str, num_workers: int) -> Iterator[RewardPool]:
    """Start workers for a reward, and wait until they are there."""
    from dteframe.engine.reward_pool import RewardPool
    from dteframe.engine.reward_worker import WorkerSettings

    folder = Path(tempfile.gettempdir())
    settings = WorkerSettings((), ((name, json.dumps(REWARDS[name])),), 2**32, folder, folder, 0)
    pool = RewardPool(settings, [name], num_workers, 600.0)
    try:
        score(pool, math_groups(-1)[: 4 * num_workers])
        yield pool
    finally:
        pool.close()


def here(name: str) -> Scorer:
    """Score with a reward in this process."""
    from dteframe import Context
    from dteframe.engine.reward_pool import RewardsHere
    from dteframe.registry import load_registry

    folder = Path(tempfile.gettempdir())
    found = load_registry([]).get("reward", name)
    context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, lambda message: None)
    scorer = RewardsHere({name: found.component(found.config(**REWARDS[name]), context)})
    score(scorer, math_groups(-1)[:4])
    return scorer


def score(scorer: Scorer, groups: Sequence[Group]) -> list[list[float]]:
    """Score groups, and give their rewards."""
    pending = [scorer.submit(*group) for group in groups]
    return [next(iter(scores().parts.values())).tolist() for scores in pending]


def cpu_seconds() -> float:
    """Give what this process and those below it have used; a worker's to the nanosecond."""
    import psutil

    tasks = [
        task
        for process in psutil.Process().children(recursive=True)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
    ]
    nanoseconds = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
    return time.process_time() + nanoseconds * 1e-9


def overhead(name: str, repeats: int) -> tuple[list[float], list[float]]:
    """Give CPU-seconds of all completions in this process, and by a worker; the two take groups in turn."""
    in_process = here(name)
    alone, pooled = [0.0] * repeats, [0.0] * repeats
    with pool_of(name, 1) as pool:
        for seed in range(repeats):
            for number, group in enumerate(math_groups(seed)):
                sides: list[tuple[Scorer, list[float]]] = [(in_process, alone), (pool, pooled)]
                found = []
                for scorer, seconds in sides if number % 2 else sides[::-1]:
                    since = cpu_seconds()
                    found.append(score(scorer, [group]))
                    seconds[seed] += cpu_seconds() - since
                assert found[0] == found[1]
    return alone, pooled


def hidden(repeats: int) -> tuple[float, float, float]:
    """Give the seconds of sampling, of scoring afterwards, and of both at once; medians."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dteframe import Context, Policy, Prompt, Sampling
    from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig

    workload = WORKLOADS["D"]
    seconds: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as name, pool_of("math_verify", 1) as pool:
        folder = Path(name)
        write(workload, folder)
        module = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, sys.stderr.write)
        rollout = TransformersRollout(TransformersRolloutConfig(), context)
        rollout.start(Policy(module, tokenizer, "cpu"))
        prompts = [Prompt(text, np.array(tokenizer(text)["input_ids"])) for text in prompts_of(workload)]
        sampling = Sampling(max_completion_length=workload.max_completion_tokens)

        def sample(seed: int, groups: Sequence[Group]) -> None:
            """Sample, and have a prepared group scored whenever one has ended."""
            seeds = [seed * len(prompts) + place for place in range(len(prompts))]
            ended = rollout.generate(prompts, workload.num_generations, sampling, seeds)
            pending = [pool.submit(*groups[place]) for place, _ in ended if groups]
            for scores in pending:
                scores()

        sample(0, [])
        for seed in range(repeats):
            early, late = (math_groups(2 * seed + place)[: len(prompts)] for place in (0, 1))
            alone, after = timed(sample, seed, []), timed(score, pool, early)
            seconds.append((alone, after, timed(sample, seed, late)))
    sampled, scored, both = (statistics.median(column) for column in zip(*seconds, strict=True))
    return sampled, scored, both


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Give the wall-clock seconds of a work."""
    since = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - since


def main() -> None:
    """Measure, and print both tables or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="ratios as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    import torch

    torch.set_num_threads(1)
    found: dict[str, float] = {}
    count = NUM_QUESTIONS * NUM_GENERATIONS
    sys.stdout.write(f"CPU-seconds of {count} completions   here  worker  ratio  quartiles  bar\n")
    for name in REWARDS:
        alone, pooled = overhead(name, options.repeats)
        ratios = [one / other for one, other in zip(pooled, alone, strict=True)]
        low, found[name], high = statistics.quantiles(ratios, n=4, method="inclusive")
        bar = f"{BAR:.2f}" if name == "math_verify" else ""
        sys.stdout.write(
            f"{name:29}{statistics.median(alone):7.3f}{statistics.median(pooled):8.3f}{found[name]:7.2f}"
            f"  {low:.2f}-{high:.2f}  {bar}\n"
        )
    sampled, scored, both = hidden(options.repeats)
    found["hidden_fraction"] = (sampled + scored - both) / min(sampled, scored)
    sys.stdout.write(
        f"seconds of workload D with math_verify: sampling {sampled:.3f}, scoring {scored:.3f}, both at "
        f"once {both:.3f}: {found['hidden_fraction']:.0%} of the shorter hidden\n"
    )
    if options.json:
        sys.stdout.write(json.dumps({name: round(value, 4) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main()
