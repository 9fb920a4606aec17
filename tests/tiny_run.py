"""A tiny recipe with every stage in it, and a way to run it from a test."""

from __future__ import annotations

import json
from pathlib import Path

from dteframe.engine.run import run_recipe
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry
from dteframe.reports import RunSummary

TINY = """\
name: tiny
seed: 0
training:
  max_steps: 6
  questions_per_step: 4
  num_generations: 4
  learning_rate: 1e-3
  selection_interval: 2
  fresh_fraction: 0.5
  evaluate_every: 3
  evaluation_size: 6
  num_generations_eval: 2
  checkpoint_every: 2
  reward_workers: 0
  device: cpu
model: {type: from_scratch, hidden_size: 32, num_layers: 1, num_heads: 2, warm_up: {steps: 20}}
dataset: {type: list_operations, size: 64, chain_lengths: [1, 2], list_length: 2}
reward: {type: format, pattern: "^[^0-9]*[0-4]"}
estimator: {type: attention, reference_size: 8, embeddings: {type: policy}}
selector: {type: difficulty_target}
replay: {type: fifo, capacity: 8}
rollout: {type: transformers, max_completion_length: 16}
objective: {type: grpo, num_minibatches: 2, num_iterations: 2}
tracker: [{type: jsonl}]
"""


def run_tiny(folder: Path, *overrides: str, resume: bool = False, plugins: Path | None = None) -> RunSummary:
    """Run the tiny recipe in ``folder/runs``; plugins, if any, are those of the folder ``plugins``."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    registry = load_registry([plugins] if plugins else [], near=recipe)
    return run_recipe(load_recipe(recipe, list(overrides), registry), registry, folder / "runs", resume)


def rows(folder: Path, name: str) -> list[dict[str, object]]:
    """Read a JSON-lines file of the tiny run, without what a clock or the machine decides."""
    lines = (folder / "runs" / "tiny" / f"{name}.jsonl").read_text().splitlines()
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.endswith("_seconds") and not key.startswith("throughput/")
        }
        for line in lines
    ]
