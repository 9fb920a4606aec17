"""What a recipe takes in memory, stage by stage, and whether a device holds it; nothing is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dteframe.contracts import LoraOptions, RolloutConfig
from dteframe.memory import (
    GIB,
    LINEAR_LAYERS,
    MIN_SAVING,
    MemoryPlan,
    MemorySettings,
    StageMemory,
    activation_bytes,
    backward_bytes,
    gathered_bytes,
    gradient_bytes,
    head_bytes,
    in_words,
    optimizer_step_bytes,
    resident_bytes,
    sampling_weights_bytes,
    shared_prompt_tokens,
    unmoved_gradient_bytes,
    with_adapter,
)
from dteframe.recipe import Recipe
from dteframe.records import ModelSizes

FORWARD_AND_BACKWARD, SAMPLING = "forward and backward", "sampling"
"""Stages that have knobs of their own."""
SAMPLING_KEYS = ("max_batch_rows", "gpu_memory_utilization")
"""Keys of some rollouts: sampling takes less where they are lower."""
CONTROL_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where a container's limit stands on Linux."""


def memory_plan(
    recipe: Recipe,
    sizes: ModelSizes,
    num_processes: int = 1,
    device_bytes: int | None = None,
    device: str | None = None,
) -> MemoryPlan:
    """Add up what each stage of a step takes on the device of one process.

    Args:
        recipe: what is to be run.
        sizes: the model's, from its configuration or as it was loaded; LoRA is added here.
        num_processes: the processes that share model and questions.
        device_bytes: the device's memory, for rollouts that take a share of it.
        device: ``cpu`` or a GPU; None for what the recipe says, where ``auto`` counts as a GPU.
    """
    if recipe.model.lora is not None:
        sizes = with_lora(sizes, recipe.model.lora)
    device = device or recipe.training.device
    settings = _settings(recipe, num_processes, device)
    batch = _longest_micro_batch(recipe, sizes, num_processes)
    completion_tokens = batch.num_rows * recipe.rollout.max_completion_length
    sampling = recipe.rollout.memory(sizes, recipe.arithmetic(), num_processes, device_bytes)
    held = resident_bytes(sizes, settings)
    kept = {**held, "the rollout's": sampling.while_updating if sampling else 0}
    gathered = gathered_bytes(sizes, settings)
    gradients = gradient_bytes(sizes, settings)
    activations = activation_bytes(
        sizes, batch.num_tokens, gradient_checkpointing=settings.gradient_checkpointing
    )
    is_fused = recipe.training.optim.endswith("_fused")
    moment = optimizer_step_bytes(sizes, settings, is_fused=is_fused, device=device)
    stages = [
        StageMemory.of(
            FORWARD_AND_BACKWARD,
            {
                **kept,
                "gathered blocks": gathered,
                "gradients": 0 if batch.is_only else gradients,
                "activations": activations + backward_bytes(sizes, batch.num_tokens),
                "logits": head_bytes(sizes, completion_tokens),
            },
        ),
        StageMemory.of(
            "end of backward",
            {**kept, "gradients": gradients, "bfloat16 gradients": unmoved_gradient_bytes(sizes, settings)},
        ),
        StageMemory.of("optimizer step", {**kept, "gradients": gradients, "for a moment": moment}),
    ]
    if sampling is not None:
        weights = sampling_weights_bytes(sizes, settings)
        stages.append(StageMemory.of(SAMPLING, {**held, "whole weights": weights, **sampling.while_sampling}))
    peak = max(stages, key=lambda stage: stage.total_bytes)
    remarks = [sizes.assumption and f"assumed: {sizes.assumption}", sampling and sampling.remark]
    if sampling is None:
        remarks.append(f"rollout {recipe.rollout.type!r} does not say what it takes: it is left out")
    return MemoryPlan(
        num_processes=num_processes,
        num_parameters=sizes.num_parameters + sizes.num_adapter_parameters,
        num_trained=sizes.num_trained,
        micro_batch_rows=batch.num_rows,
        micro_batch_row_length=batch.row_length,
        stages=tuple(stages),
        peak_stage=peak.name,
        peak_bytes=peak.total_bytes,
        remarks=tuple(remark for remark in remarks if remark),
    )


def shortage(plan: MemoryPlan, recipe: Recipe, available_bytes: int, device: str) -> str | None:
    """Say that a run will not fit, and what to turn, or None if it may."""
    if plan.peak_bytes <= available_bytes:
        return None
    return (
        f"memory: the stage {plan.peak_stage!r} needs about {in_words(plan.peak_bytes)} and {device} has "
        f"{in_words(available_bytes)}; {_knobs(plan, recipe)} (`dteframe plan` lists what takes how much)"
    )


def device_bytes(recipe: Recipe, num_processes: int, gpu_gib: float | None) -> int | None:
    """Give the memory that a process may take: a GPU's, its share of the machine's, or None if unknown.

    A recipe whose device is ``auto`` may run anywhere: without ``gpu_gib`` it is held against nothing.
    """
    if gpu_gib is not None:
        return int(gpu_gib * GIB)
    return machine_bytes() // num_processes if recipe.training.device == "cpu" else None


def machine_bytes() -> int:
    """Give the machine's memory, or the container's limit if that is less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CONTROL_GROUP_LIMIT.read_text().strip() if CONTROL_GROUP_LIMIT.is_file() else "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def sampling_keys(rollout: RolloutConfig) -> list[str]:
    """Name those of ``SAMPLING_KEYS`` that the rollout has."""
    return [key for key in SAMPLING_KEYS if key in type(rollout).model_fields]


def _settings(recipe: Recipe, num_processes: int, device: str) -> MemorySettings:
    return MemorySettings(
        float32_master_weights=recipe.training.float32_master_weights,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        cpu_offload=recipe.training.cpu_offload and device != "cpu",  # There it would move nothing.
        keeps_reference_model=recipe.objective.needs_reference_model(),
        num_processes=num_processes,
    )


def with_lora(sizes: ModelSizes, options: LoraOptions) -> ModelSizes:
    """Add LoRA on the layers that it names, of those that a Qwen2 or Llama has."""
    wanted = options.target_modules
    targets = (
        LINEAR_LAYERS if wanted == "all-linear" else tuple(name for name in LINEAR_LAYERS if name in wanted)
    )
    return with_adapter(sizes, options.r, targets)


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """A micro-batch of the longest rollouts."""

    num_rows: int
    row_length: int
    num_tokens: int
    """Tokens of rows of their own that take as much memory."""
    is_only: bool
    """Whether it is a whole minibatch."""


def _longest_micro_batch(recipe: Recipe, sizes: ModelSizes, num_processes: int) -> _MicroBatch:
    """Reckon what ``engine.micro_batches.split`` makes of the longest rollouts.

    Where prompts are shared, it holds whole groups, and as much of one more as fits.
    """
    training, completion_length = recipe.training, recipe.rollout.max_completion_length
    length = training.max_prompt_length + completion_length
    groups = -(-training.questions_per_step // recipe.objective.num_minibatches)
    num_rows = -(-groups * training.num_generations // num_processes)
    num_repeated = (training.num_generations - 1) * training.max_prompt_length
    if sizes.shares_prompts and num_repeated >= MIN_SAVING * training.num_generations * length:
        of_prompt, of_completion = shared_prompt_tokens(
            sizes,
            training.max_prompt_length,
            completion_length,
            gradient_checkpointing=training.gradient_checkpointing,
        )
        of_group = of_prompt + training.num_generations * of_completion
        whole, left = divmod(training.micro_batch_tokens, of_group)
        of_a_part = max(0, int((left - of_prompt) / of_completion))
        rows = max(1, min(int(whole) * training.num_generations + of_a_part, num_rows))
        num_prompts = -(-rows // training.num_generations)
        tokens = max(length, int(num_prompts * of_prompt + rows * of_completion))
        return _MicroBatch(rows, length, tokens, rows == num_rows)
    rows = max(1, min(training.micro_batch_tokens // length, num_rows))
    return _MicroBatch(rows, length, rows * length, rows == num_rows)


def _knobs(plan: MemoryPlan, recipe: Recipe) -> str:
    """Say what makes the largest stage smaller, the cheapest first."""
    knobs = []
    if plan.peak_stage == SAMPLING:
        knobs += [f"rollout.{key}" for key in sampling_keys(recipe.rollout)]
        return f"lower {' or '.join([*knobs, 'rollout.max_completion_length'])}"
    if plan.peak_stage == FORWARD_AND_BACKWARD:
        if plan.micro_batch_rows > 1:
            knobs.append(f"lower training.micro_batch_tokens from {recipe.training.micro_batch_tokens}")
        if not recipe.training.gradient_checkpointing:
            knobs.append("set training.gradient_checkpointing")
    if recipe.model.dtype == "float32":
        knobs.append("set model.dtype to bfloat16")
    if recipe.model.lora is None:
        knobs.append("give model.lora")
    return ", or ".join([*knobs, "take a smaller model or more processes"])
