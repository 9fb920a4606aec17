"""Measure the peak memory of an update or of sampling, and print it beside what the arithmetic says.

    python tests/measure_memory.py update model.hidden_size=512 training.micro_batch_tokens=4096

A process of its own, because memory that was once taken stays with a process. docs/memory.md has a table of
what this printed.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dteframe.contracts import Context, Policy
from dteframe.engine.model_options import apply_model_options
from dteframe.engine.optimizer import OptimizerSettings
from dteframe.engine.update import Learner
from dteframe.memory_plan import memory_plan
from dteframe.models.architectures import untrained_module
from dteframe.models.characters import character_tokenizer
from dteframe.objectives.grpo import GRPO
from dteframe.recipe import Recipe, load_recipe
from dteframe.records import Completion, CreditedGroup, Group, Prompt, Sampling
from dteframe.registry import load_registry
from dteframe.rollouts.transformers import TransformersRollout
from dteframe.testing.subject import in_order

RECIPE = """
name: measured
training:
  max_steps: 2
  questions_per_step: 2
  num_generations: 4
  max_prompt_length: 64
  micro_batch_tokens: 2048
  device: cpu
model: {type: from_scratch, hidden_size: 256, num_layers: 6, num_heads: 8, num_key_value_heads: 2}
dataset: {type: list_operations}
reward: {type: exact_match}
rollout: {type: transformers, max_completion_length: 192}
"""
RESET_PEAK = Path("/proc/self/clear_refs")
CONTEXT = Context(Path("x"), Path("x"), "cpu", 0, progress=lambda *_: None, warn=lambda _: None)


def recipe_of(overrides: list[str]) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.yaml"
        path.write_text(RECIPE)
        return load_recipe(path, overrides, load_registry(plugin_paths=[])).recipe


def policy_of(recipe: Recipe, device: str) -> Policy:
    tokenizer = character_tokenizer(())
    module = untrained_module(recipe.model.architecture, recipe.model.architecture_sizes(), tokenizer, 0)
    policy = Policy(module.to(device, getattr(torch, recipe.model.dtype)), tokenizer, device)
    apply_model_options(policy, recipe.model, recipe.training, np.random.default_rng(0))
    return policy


def update(recipe: Recipe, device: str = "cpu") -> None:
    """Take two steps: the second has the optimizer's moments and the first's freed memory."""
    training, sampling = recipe.training, recipe.rollout.sampling()
    objective = GRPO(recipe.objective, CONTEXT)
    learner = Learner(
        policy_of(recipe, device), objective, OptimizerSettings.from_training(training), sampling
    )
    rng = np.random.default_rng(0)
    rewards = np.array([1.0] + [0.0] * (training.num_generations - 1))
    credited = []
    for name in range(training.questions_per_step):
        prompt = rng.integers(3, 90, size=training.max_prompt_length)
        # Lengths differ by a token, so that rows are padded as real ones are.
        completions = tuple(
            Completion(
                rng.integers(3, 90, size=sampling.max_completion_length - index % 2),
                np.full(sampling.max_completion_length - index % 2, -4.6),
                "length",
                "",
            )
            for index in range(training.num_generations)
        )
        group = Group(str(name), prompt, completions, rewards, 1, 0, "train")
        credited.append(CreditedGroup(group, objective.advantages(rewards), False, 0))
    for _ in range(2):
        learner.update(credited, rng)


def sample(recipe: Recipe) -> None:
    """Sample the likeliest token, which is never the end token: its logit is 0."""
    training, length = recipe.training, recipe.rollout.max_completion_length
    rollout = TransformersRollout(recipe.rollout, CONTEXT)
    policy = policy_of(recipe, "cpu")
    with torch.no_grad():
        policy.module.get_output_embeddings().weight[policy.tokenizer.eos_token_id] = 0
    rollout.start(policy)
    rng = np.random.default_rng(0)
    lengths = training.max_prompt_length - np.arange(training.questions_per_step) % 2
    prompts = [Prompt(str(index), rng.integers(3, 90, size=size)) for index, size in enumerate(lengths)]
    sampling = Sampling(top_k=1, max_completion_length=length)
    answers = in_order(rollout.generate(prompts, training.num_generations, sampling, [0] * len(prompts)))
    assert {len(completion.token_ids) for group in answers for completion in group} == {length}


def status_bytes(key: str) -> int:
    """Read ``VmRSS`` (now) or ``VmHWM`` (the most since it was reset)."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main() -> None:
    what, *overrides = sys.argv[1:]
    recipe = recipe_of(overrides)
    work = {"update": update, "sampling": sample}[what]
    work(recipe_of(["model.hidden_size=16", "model.num_layers=1", "rollout.max_completion_length=4"]))
    before = status_bytes("VmRSS")
    RESET_PEAK.write_text("5")
    work(recipe)
    measured = status_bytes("VmHWM") - before
    plan = memory_plan(recipe, recipe.model.sizes())
    stages = [stage for stage in plan.stages if (stage.name == "sampling") == (what == "sampling")]
    largest = max(stages, key=lambda stage: stage.total_bytes)
    # Nothing is updated before the sampling here, so there is nothing of the optimizer's.
    left_out = ("float32 masters", "optimizer") if what == "sampling" else ()
    parts = {part: size for part, size in largest.parts.items() if part not in left_out}
    told = {"measured_bytes": measured, "planned_bytes": sum(parts.values()), "stage": largest.name}
    sys.stdout.write(json.dumps({**told, "parts": parts, "parameters": plan.num_parameters}) + "\n")


if __name__ == "__main__":
    main()
