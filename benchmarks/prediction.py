"""CPU-seconds of a prediction over a pool, as a share of those of sampling 64 x 8 completions.

The sampler is that of recipes/quickstart.yaml with its warmed-up model. Every estimator has measured four
batches of 512 groups (or its references), and predicts random embeddings of the width of the quickstart's
policy, or another. Prediction and sampling are timed in turn, on one thread.

    python benchmarks/prediction.py                      # 24,000 questions of width 64: the quickstart's
    python benchmarks/prediction.py --width 384          # of a sentence model's width
    python benchmarks/prediction.py --json               # last line: {"attention, training": share, ...}
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workloads import use_one_thread

if TYPE_CHECKING:
    from dteframe import Context, Estimator

BAR = 0.02
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NUM_PROMPTS, NUM_GENERATIONS = 64, 8
BATCHES, GROUPS_PER_BATCH = 4, 512
ESTIMATORS = {
    "beta_posterior": {"type": "beta_posterior"},
    "attention, 32 rolled out": {"type": "attention", "reference_size": 32},
    "attention, 128 rolled out": {"type": "attention", "reference_size": 128},
    "attention, 128 training": {"type": "attention", "references": "training", "reference_size": 128},
    "history_and_attention, 128": {"type": "history_and_attention", "reference_size": 128},
    "attention, 256 rolled out": {"type": "attention"},
    "attention, 256 training": {"type": "attention", "references": "training"},
    "history_and_attention, 256": {"type": "history_and_attention"},
    "attention, remembered": {"type": "attention", "reference_half_life": 200.0},
    "policy_probe": {"type": "policy_probe"},
}


def sampler(context: Context) -> Callable[[int], int]:
    """Load the quickstart's model and give what samples one batch and counts its tokens."""
    import numpy as np

    from dteframe import Prompt
    from dteframe.assemble import assemble
    from dteframe.recipe import load_recipe
    from dteframe.registry import load_registry
    from dteframe.testing.subject import in_order

    registry = load_registry([])
    recipe = load_recipe(RECIPE, [], registry).recipe
    parts = assemble(recipe, registry, context)
    questions = parts.dataset.load().train
    policy = parts.model.load(questions)
    parts.rollout.start(policy)
    parts.rollout.sync(policy)
    texts = [str(question.prompt) for question in questions[:NUM_PROMPTS]]
    prompts = [Prompt(text, np.array(policy.tokenizer(text)["input_ids"])) for text in texts]

    def sample(seed: int) -> int:
        seeds = [seed * NUM_PROMPTS + place for place in range(NUM_PROMPTS)]
        groups = in_order(parts.rollout.generate(prompts, NUM_GENERATIONS, recipe.rollout.sampling(), seeds))
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return sample


def ready(options: dict[str, object], num_questions: int, width: int, context: Context) -> Estimator:
    """Start an estimator on random embeddings and have it measure four batches."""
    import numpy as np

    from dteframe import Observation, Question
    from dteframe.registry import load_registry

    found = load_registry([]).get("estimator", str(options["type"]))
    estimator = found.component(found.config(**options), context)
    ids = [f"q{place}" for place in range(num_questions)]
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((num_questions, width), dtype=np.float32)
    estimator.start(tuple(Question(name, name, name, "") for name in ids), lambda texts: embeddings.copy())
    for version in range(BATCHES):
        for purpose, chosen in (
            ("reference", list(estimator.references(rng))),
            ("train", [ids[place] for place in rng.choice(num_questions, GROUPS_PER_BATCH, replace=False)]),
        ):
            if chosen:
                counts = rng.integers(9, size=len(chosen)), np.full(len(chosen), 8)
                estimator.observe(Observation(tuple(chosen), *counts, version, purpose))
    return estimator


def bare_product(num_questions: int, width: int) -> Callable[[], None]:
    """Give the product of all embeddings with 256 references and the exponentials of it, nothing else."""
    import numpy as np

    rng = np.random.default_rng(0)
    queries, keys = (
        0.1 * rng.standard_normal((size, width), dtype=np.float32) for size in (num_questions, 256)
    )
    part = np.empty((1024, 256), np.float32)

    def multiply() -> None:
        for first in range(0, num_questions - 1023, 1024):
            np.matmul(queries[first : first + 1024], keys.T, out=part)
            np.exp(part, out=part)

    return multiply


def seconds_of(work: Callable[[], object]) -> float:
    """Give the CPU-seconds of a work."""
    since = time.process_time()
    work()
    return time.process_time() - since


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=24_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="shares as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    import torch

    from dteframe import Context
    from dteframe.engine.run_folder import cache_folder

    torch.set_num_threads(1)
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        context = Context(cache_folder(), Path(folder), "cpu", 0, lambda *_: None, sys.stderr.write)
        sample = sampler(context)
        sample(0)
        sys.stdout.write(f"{'':28}{'milliseconds':>14}{'of sampling':>13}{'quartiles':>15}{'bar':>6}\n")
        works: dict[str, Callable[[], object]] = {
            name: partial(ready(config, options.questions, options.width, context).predict, BATCHES)
            for name, config in ESTIMATORS.items()
        }
        works["bare product and exp, 256"] = bare_product(options.questions, options.width)
        for name, predict in works.items():
            predicting, of_pairs = [], []
            for seed in range(1, options.repeats + 1):
                sampling = seconds_of(partial(sample, seed))
                predicting.append(seconds_of(predict))
                of_pairs.append(predicting[-1] / sampling)
            low, shares[name], high = statistics.quantiles(of_pairs, n=4, method="inclusive")
            spread = f"{low:.1%}-{high:.1%}"
            milliseconds = 1000 * statistics.median(predicting)
            sys.stdout.write(f"{name:28}{milliseconds:14.1f}{shares[name]:13.1%}{spread:>15}{BAR:>6.0%}\n")
            sys.stdout.flush()
        sys.stdout.write(f"sampling: {sampling:.2f} s for {sample(0)} tokens\n")
    if options.json:
        sys.stdout.write(json.dumps(shares) + "\n")


if __name__ == "__main__":
    main()
