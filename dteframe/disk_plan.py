"""What a recipe takes on the disk of its run folder, by arithmetic alone; nothing is loaded.

What grows with the pool (the estimate that a plan keeps, an estimator's records) is left out: about 50 bytes
for each question in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dteframe.memory import ADAM_MOMENTS, FLOAT32, in_words
from dteframe.memory_plan import with_lora
from dteframe.plan_text import Workload, workload
from dteframe.recipe import Recipe
from dteframe.records import ModelSizes

SMALL_VOCABULARY = 512
"""A tokenizer of at most this many tokens has one for a byte."""
TEXT_BYTES = 4
"""Of a token of a larger vocabulary, in English and mathematics."""
METRICS_BYTES, TENSORBOARD_BYTES = 3000, 6200
"""Of a step."""
SELECTION_BYTES, SELECTED_BYTES = 600, 60
"""Of a plan, and of each of its questions."""
GROUP_BYTES, COMPLETION_BYTES, REPLAYED_BYTES = 200, 105, 140
"""What rollouts.jsonl says of a group, of a completion beside its text, and of a group that is replayed."""
TRACE_BYTES = 125
"""What trace.jsonl says of a group beside the question."""
HELD_GROUP_BYTES, HELD_TOKEN_BYTES = 900, 12
"""What a checkpoint says of a group in the replay buffer, and of a token beside its text."""
CHECKPOINT_BYTES, VOCABULARY_BYTES = 20_000, 75
"""Of a checkpoint's small files, and of a tokenizer's files for each token."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a run folder takes at the end of its run, in bytes; completions as long as they may be."""

    checkpoint_bytes: int
    """One checkpoint: policy, optimizer, replay buffer."""
    num_checkpoints: int
    """That are kept at the same time, the best one included; while one is written, it comes on top."""
    parts: Mapping[str, int]
    """Of the whole, by what they are for."""
    total_bytes: int


def disk_plan(recipe: Recipe, sizes: ModelSizes) -> DiskPlan:
    """Add up what a run writes.

    Args:
        recipe: what is to be run.
        sizes: the model's, without LoRA, which the recipe says.
    """
    if recipe.model.lora is not None:
        sizes = with_lora(sizes, recipe.model.lora)
    text_bytes = 1 if sizes.vocabulary_size <= SMALL_VOCABULARY else TEXT_BYTES
    work, training = workload(recipe), recipe.training
    policy = sizes.num_parameters * sizes.parameter_bytes + sizes.vocabulary_size * VOCABULARY_BYTES
    adapter = sizes.num_adapter_parameters * FLOAT32
    checkpoint = CHECKPOINT_BYTES + (adapter or policy) + _learner_bytes(recipe, sizes)
    checkpoint += recipe.replay.num_held() * _held_bytes(recipe, text_bytes)
    num_written = 1 if not training.checkpoint_every else -(-training.max_steps // training.checkpoint_every)
    limit, keeps_best = training.save_total_limit, training.evaluate_every > 0
    num_kept = num_written if limit is None else min(num_written, limit + keeps_best)
    parts = {
        "checkpoints": num_kept * checkpoint,
        "policy": policy + adapter,
        "records": _records_bytes(recipe, work, text_bytes),
    }
    if any(tracker.type == "tensorboard" for tracker in recipe.tracker):
        parts["tensorboard"] = training.max_steps * TENSORBOARD_BYTES
    return DiskPlan(checkpoint, num_kept, parts, sum(parts.values()))


def disk_text(plan: DiskPlan | None) -> str:
    """Word what the run folder takes.

    Args:
        plan: None where the model's sizes are unknown.
    """
    if plan is None:
        return "disk: unknown, as memory is"
    each = f"{plan.num_checkpoints} of {in_words(plan.checkpoint_bytes)}, and another while it is written"
    lines = [f"disk: about {in_words(plan.total_bytes)} at the end", f"  {'checkpoints':<22}{each}"]
    rest = [(part, size) for part, size in plan.parts.items() if part != "checkpoints"]
    return "\n".join([*lines, *(f"  {part:<22}{in_words(size)}" for part, size in rest)])


def _learner_bytes(recipe: Recipe, sizes: ModelSizes) -> int:
    """Give the bytes of the optimizer, of masters beside the weights, and of the first policy."""
    is_mixed = sizes.parameter_bytes < FLOAT32 and recipe.training.float32_master_weights
    of_trained = FLOAT32 if is_mixed or sizes.num_adapter_parameters else sizes.parameter_bytes
    masters = sizes.num_trained * FLOAT32 if is_mixed and not sizes.num_adapter_parameters else 0
    keeps_reference = recipe.objective.needs_reference_model() and not sizes.num_adapter_parameters
    reference = sizes.num_parameters * sizes.parameter_bytes if keeps_reference else 0
    return ADAM_MOMENTS * sizes.num_trained * of_trained + masters + reference


def _held_bytes(recipe: Recipe, text_bytes: int) -> int:
    """Give the bytes of a group in the replay buffer."""
    arithmetic = recipe.arithmetic()
    tokens = arithmetic.num_generations * arithmetic.max_completion_length
    return HELD_GROUP_BYTES + tokens * (HELD_TOKEN_BYTES + text_bytes)


def _records_bytes(recipe: Recipe, work: Workload, text_bytes: int) -> int:
    """Give the bytes of metrics, selections, rollouts and trace, half of what can be reused being reused."""
    fresh = (work.total_fresh_rollouts_at_least + work.total_fresh_rollouts_at_most) // 2
    rollouts = fresh + work.total_reference_rollouts + work.total_evaluation_rollouts_at_most
    groups = (fresh + work.total_reference_rollouts) // work.num_generations
    groups += work.evaluations * work.questions_per_evaluation_at_most
    prompt = recipe.training.max_prompt_length * text_bytes
    written = rollouts * (COMPLETION_BYTES + work.max_completion_length * text_bytes)
    written += groups * (GROUP_BYTES + prompt) + work.total_replayed_groups_at_most * REPLAYED_BYTES
    selections = work.num_plans * (SELECTION_BYTES + work.selected_per_plan_at_most * SELECTED_BYTES)
    options = next(tracker.model_dump() for tracker in recipe.tracker if tracker.type == "jsonl")
    share = 0.0 if options["rollouts"] == "none" else 1 / options["rollouts_every"]
    return int(
        work.max_steps * METRICS_BYTES + selections + share * written + groups * (TRACE_BYTES + prompt)
    )
