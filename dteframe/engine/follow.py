"""A process that follows the main one: it does what it is told, until there is nothing more to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from dteframe.assemble import assemble
from dteframe.contracts import Context
from dteframe.engine.distributed import Processes, device_of_this_process
from dteframe.engine.member import Work, join
from dteframe.engine.meter import Meter
from dteframe.engine.model_options import checkpoint_gradients
from dteframe.engine.outcome import saying_how_to_go_on
from dteframe.engine.reward_pool import scoring
from dteframe.engine.run_folder import cache_folder
from dteframe.engine.sharding import Skeleton
from dteframe.recipe import LoadedRecipe
from dteframe.registry import Registry


def follow_recipe(loaded: LoadedRecipe, registry: Registry, runs_folder: Path, processes: Processes) -> None:
    """Take part in the run that the main process leads; data, plans and files are its own affair.

    Args:
        loaded: the same recipe.
        registry: the same plugins.
        runs_folder: the same place.
        processes: this process is not the main one.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it is untyped
    recipe = loaded.recipe
    untold: list[str] = []
    context = Context(
        cache_folder=cache_folder(),
        run_folder=runs_folder / recipe.name,
        device=device_of_this_process(recipe.training.device),
        seed=recipe.seed,
        progress=lambda what, done, total: None,
        warn=untold.append,
    )
    with saying_how_to_go_on(context.run_folder, registry):
        skeleton: Skeleton | None = processes.broadcast(None)
        assert skeleton is not None
        policy = skeleton.build(context.device)
        if recipe.training.gradient_checkpointing:
            checkpoint_gradients(policy.module)
        parts = assemble(recipe, registry, context)
        with scoring(recipe.training, registry, parts.rewards, context) as scorer:
            member = join(recipe, context, parts, policy, Meter(), processes, scorer, untold)
            while (work := _next(processes)) is not None:
                work.do(member)


def _next(processes: Processes) -> Work[Any] | None:
    """Wait for what the main process wants done; None when the run has finished."""
    work: Work[Any] | None = None
    return processes.broadcast(work)
