"""A warning before a run that its device cannot hold."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from dteframe.contracts import Context, Policy
from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.engine.throughput import peak_main_memory
from dteframe.memory_plan import machine_bytes, memory_plan, shortage
from dteframe.recipe import Recipe

MEMORY_STATUS = Path("/proc/meminfo")
"""Where Linux says how much memory is left."""


def with_effective_offload(recipe: Recipe, context: Context, *, is_sharded: bool) -> Recipe:
    """Give the recipe without ``training.cpu_offload`` where that does nothing, and warn of it.

    Args:
        recipe: what is run.
        context: of the run.
        is_sharded: whether FSDP2 spreads the module over processes, one at least: it alone offloads.
    """
    if not recipe.training.cpu_offload:
        return recipe
    if context.device == "cpu":
        context.warn("training.cpu_offload: True has no effect on a CPU: all is in main memory; leave it out")
    elif is_sharded:
        return recipe
    else:
        context.warn("training.cpu_offload: True has no effect without --processes; give --processes 1")
    return replace(recipe, training=recipe.training.model_copy(update={"cpu_offload": False}))


def warn_of_shortage(recipe: Recipe, policy: Policy, context: Context, num_processes: int) -> None:
    """Warn if a stage of the run will need more than is free; the run goes on: this is arithmetic.

    Nothing is said of models whose sizes are unknown.
    """
    sizes = loaded_sizes(policy.module)
    if sizes is None:
        return
    whole, available = _device_memory(context.device)
    plan = memory_plan(recipe, sizes, num_processes, whole, context.device)
    message = shortage(plan, recipe, available, context.device)
    if message is not None:
        context.warn(message)


def _device_memory(device: str) -> tuple[int, int]:
    """Give a process's memory: the whole device's, and what is free or its own already."""
    if torch.device(device).type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free + torch.cuda.memory_reserved(device)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun sets it.
    whole = machine_bytes()
    found = MEMORY_STATUS.is_file() and re.search(
        r"^MemAvailable:\s+(\d+) kB", MEMORY_STATUS.read_text(), re.M
    )
    free = min(whole, int(found[1]) * 1024) if found else whole
    return whole // on_this_machine, min(whole, free + peak_main_memory()) // on_this_machine
