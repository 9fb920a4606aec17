"""What comes before the first step: the surroundings, the data, the policy, and the parts that start."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pluggy

from dteframe.assemble import Parts
from dteframe.contracts import Context
from dteframe.engine import calls
from dteframe.engine.canary import canary_for
from dteframe.engine.distributed import Processes, device_of_this_process
from dteframe.engine.encode import encode_with
from dteframe.engine.fit import warn_of_shortage, with_effective_offload
from dteframe.engine.member import join
from dteframe.engine.meter import Meter
from dteframe.engine.model_options import apply_model_options
from dteframe.engine.out_of_memory import SMALLER_MODEL, SMALLER_OPTIMIZER, memory_for
from dteframe.engine.pool import Pool, encode_prompts, make_pool
from dteframe.engine.progress import Progress
from dteframe.engine.reward_pool import Scorer
from dteframe.engine.run_folder import cache_folder
from dteframe.engine.setup import Setup
from dteframe.engine.sharding import Skeleton
from dteframe.engine.streams import Streams
from dteframe.errors import DataError
from dteframe.recipe import Recipe


def context_of(recipe: Recipe, folder: Path, hooks: pluggy.PluginManager, progress: Progress) -> Context:
    """Make the surroundings of the components; each warning is told once."""

    def warn(message: str) -> None:
        if message in progress.warnings:
            return  # Another process, or an earlier step, has said it.
        progress.warnings.append(message)
        hooks.hook.dteframe_warned(message=message)

    def tell_progress(what: str, done: int, total: int) -> None:
        hooks.hook.dteframe_progress(what=what, done=done, total=total)

    return Context(
        cache_folder=cache_folder(),
        run_folder=folder,
        device=device_of_this_process(recipe.training.device),
        seed=recipe.seed,
        progress=tell_progress,
        warn=warn,
    )


def set_up(
    recipe: Recipe,
    context: Context,
    parts: Parts,
    hooks: pluggy.PluginManager,
    processes: Processes,
    scorer: Scorer,
) -> Setup:
    """Load data and policy, and start the parts: everything that comes before the first step."""
    training, streams, meter = recipe.training, Streams(recipe.seed), Meter()
    with meter.stage("load"):
        questions = calls.load(parts.dataset)
        rng = streams(0, "hold_out")
        pool = make_pool(questions, parts.rewards, training.evaluation_size, rng, context.warn)
        with memory_for("load", "the model", context.device, SMALLER_MODEL), calls.running(parts.model):
            policy = parts.model.load(tuple(pool.train.values()))
        apply_model_options(policy, recipe.model, training, streams(0, "lora"))
        effective = with_effective_offload(recipe, context, is_sharded=processes.are_sharded)
        warn_of_shortage(effective, policy, context, processes.count)
        pool, prompts = encode_prompts(pool, policy.tokenizer, training.max_prompt_length, context.warn)
    _refuse_small_pool(recipe, pool)
    embedding = memory_for("embed", "the questions", context.device, SMALLER_MODEL)
    with meter.stage("embed"), embedding, calls.running(parts.estimator):
        parts.estimator.start(tuple(pool.train.values()), partial(encode_with, policy, context.progress))
    with calls.running(parts.selector):
        parts.selector.start(recipe.arithmetic())
    with meter.stage("load"):
        if processes.are_sharded:
            processes.broadcast(Skeleton.of(policy))
        with memory_for("load", "what training needs", context.device, SMALLER_OPTIMIZER):
            member = join(recipe, context, parts, policy, meter, processes, scorer, [])
    return Setup(
        member=member,
        arithmetic=recipe.arithmetic(),
        pool=pool,
        prompts=prompts,
        streams=streams,
        hooks=hooks,
        canary=canary_for(parts.rollout, policy, [prompts[question_id] for question_id in pool.train]),
    )


def _refuse_small_pool(recipe: Recipe, pool: Pool) -> None:
    arithmetic = recipe.arithmetic()
    needed = max(arithmetic.questions_per_plan, arithmetic.reference_size)
    if len(pool.train) < needed:
        raise DataError(
            f"dataset: a plan asks {arithmetic.questions_per_plan} questions (training.questions_per_step x "
            f"training.selection_interval) and {arithmetic.reference_size} references, "
            f"but {len(pool.train)} training questions are left; lower these or give more data"
        )
