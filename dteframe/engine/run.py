"""A run from its recipe to its last checkpoint."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pluggy
import transformers

from dteframe.assemble import Parts, assemble
from dteframe.contracts import Context
from dteframe.engine import calls
from dteframe.engine.advice import advise
from dteframe.engine.canary import canary_for
from dteframe.engine.checkpoint import load_checkpoint, save_checkpoint, save_policy
from dteframe.engine.checkpoint_folder import checkpoints_of, damage_of, newest_checkpoint
from dteframe.engine.disk import disk_for
from dteframe.engine.distributed import ALONE, Processes, device_of_this_process
from dteframe.engine.encode import encode_with
from dteframe.engine.evaluate import evaluate
from dteframe.engine.fit import warn_of_shortage, with_effective_offload
from dteframe.engine.member import join
from dteframe.engine.meter import Meter
from dteframe.engine.model_options import apply_model_options, num_trainable
from dteframe.engine.non_finite import NonFiniteError
from dteframe.engine.out_of_memory import SMALLER_MODEL, SMALLER_OPTIMIZER, memory_for
from dteframe.engine.pool import Pool, encode_prompts, make_pool
from dteframe.engine.progress import Progress
from dteframe.engine.reward_pool import Scorer, scoring
from dteframe.engine.run_folder import (
    cache_folder,
    changed_plugins,
    check_run_folder,
    clear_run_folder,
    has_begun,
    locked,
    write_run_folder,
    write_summary,
)
from dteframe.engine.setup import Setup
from dteframe.engine.sharding import Skeleton
from dteframe.engine.step import training_step
from dteframe.engine.stop import Stop, StoppedError
from dteframe.engine.streams import Streams
from dteframe.engine.throughput import throughput_of
from dteframe.errors import DataError, ResumeError
from dteframe.recipe import LoadedRecipe, Recipe, TrainingConfig
from dteframe.registry import Registry
from dteframe.reports import RunReport, RunSummary, StageReport, StepReport

NUM_STEPS_WITHOUT_SIGNAL = 3
"""Steps without any informative group after which somebody should look."""


def run_recipe(
    loaded: LoadedRecipe,
    registry: Registry,
    runs_folder: Path,
    resume: bool,
    processes: Processes = ALONE,
    stop: Stop | None = None,
) -> RunSummary:
    """Train in ``runs_folder/NAME``; with ``resume``, go on from the newest whole checkpoint.

    Under several processes the main one calls this, and the others ``follow_recipe``.

    Raises:
        StoppedError: ``stop`` heard that the run is to end; a checkpoint of its last step is written.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it is untyped
    recipe = loaded.recipe
    folder = runs_folder / recipe.name
    progress = Progress()
    context = _context(recipe, folder, registry.hooks, progress)
    with locked(folder):
        check_run_folder(folder, recipe, resume=resume)
        for change in changed_plugins(folder, registry) if has_begun(folder) else ():
            context.warn(change)
        parts = assemble(recipe, registry, context)
        with (
            _listening(parts, registry.hooks),
            saying_how_to_go_on(folder, registry),
            disk_for(folder),
            scoring(recipe.training, registry, parts.rewards, context) as scorer,
        ):
            setup = _begin(recipe, context, parts, registry, progress, processes, scorer)
            registry.hooks.hook.dteframe_run_started(run=_run_report(setup, progress))
            try:
                _train(setup, progress, stop or Stop())
            except StoppedError:
                processes.broadcast(None)  # The others have no part in what comes of it.
                raise
            with setup.meter.stage("checkpoint"):
                save_policy(setup)
            processes.broadcast(None)  # Nothing more is to be done.
            setup.meter.close_step()
            summary = _summary(setup, progress)
            write_summary(folder, summary)
            registry.hooks.hook.dteframe_run_finished(summary=summary)
    return summary


def _begin(  # noqa: PLR0913  # all that a run begins with, once
    recipe: Recipe,
    context: Context,
    parts: Parts,
    registry: Registry,
    progress: Progress,
    processes: Processes,
    scorer: Scorer,
) -> Setup:
    """Set everything up, and go on from the newest whole checkpoint if there is one."""
    folder = context.run_folder
    checkpoint = newest_checkpoint(folder, context.warn)
    if checkpoint is None:
        clear_run_folder(folder)
    setup = _set_up(recipe, context, parts, registry.hooks, processes, scorer)
    if checkpoint is not None:
        with setup.meter.stage("load"):
            load_checkpoint(setup, progress, checkpoint)
        _refuse_to_go_back(recipe, progress, checkpoint)
    write_run_folder(folder, recipe, registry, progress.step)
    return setup


def _train(setup: Setup, progress: Progress, stop: Stop) -> None:
    """Repeat the step: evaluate, report and checkpoint at their turns, and at the end."""
    training, canary_every = setup.recipe.training, setup.recipe.rollout.canary_every
    reports = _checked(setup)
    if progress.step == 0:
        if training.evaluate_every:
            reports.append(evaluate(setup, 0))
        _report(setup, progress, reports)
    else:
        setup.meter.close_step()  # What resuming took is no part of a step.
    while progress.step < training.max_steps:
        with stop.held_together():
            reports = list(training_step(setup, progress))
            is_last = progress.step == training.max_steps
            if canary_every and progress.step % canary_every == 0:
                reports += _checked(setup)
            if training.evaluate_every and (is_last or progress.step % training.evaluate_every == 0):
                reports.append(evaluate(setup, progress.step))
            _report(setup, progress, reports)
            is_due = training.checkpoint_every and progress.step % training.checkpoint_every == 0
            if is_last or is_due or stop.is_wanted:
                stop.forget_deadline()
                with setup.meter.stage("checkpoint"):
                    save_checkpoint(setup, progress)
    if training.evaluate_every and progress.evaluated_step != progress.step:
        # The run is resumed where it already has all of its steps, and ends earlier than it was to.
        progress.note_evaluation(evaluate(setup, progress.step), progress.step)


def _checked(setup: Setup) -> list[StageReport]:
    """See that sampler and trainer agree, where somebody wants to know."""
    if setup.canary is None:
        return []
    with setup.meter.stage("canary"):
        return [setup.canary.check(setup.member)]


def _report(setup: Setup, progress: Progress, stages: list[StageReport]) -> None:
    """Close the step's books and tell everybody."""
    times = setup.meter.close_step()
    report = StepReport(
        step=progress.step,
        max_steps=setup.recipe.training.max_steps,
        stages=(
            *stages,
            setup.meter.rewards(),
            setup.meter.health(),
            times,
            throughput_of(setup, stages, times),
            setup.meter.costs(),
        ),
    )
    progress.note(report)
    advise(setup, progress)
    if progress.step == NUM_STEPS_WITHOUT_SIGNAL and progress.informative_groups == 0:
        setup.context.warn(
            f"no group of the first {progress.step} steps held both successes and failures, so nothing is "
            f"learnt: {_likely_cause(progress, setup.meter)}; look at "
            f"{setup.context.run_folder / 'rollouts.jsonl'}"
        )
    for message in progress.health.look_at(report, setup.recipe.training.health):
        setup.context.warn(message)
    setup.hooks.hook.dteframe_step_finished(report=report)
    _refuse_many_skips(setup.recipe.training, progress)


def _likely_cause(progress: Progress, meter: Meter) -> str:
    statuses = meter.reward_statuses
    num_unscored = statuses.total() - statuses["scored"]
    if num_unscored > statuses["scored"]:
        return (
            f"of {statuses.total()} completions {statuses['unparseable']} hold no answer that the reward "
            f"finds (its answer_pattern) and {num_unscored - statuses['unparseable']} could not be scored"
        )
    if not progress.rewards_vary:
        return f"all rewards are {progress.first_reward:g}: the reward, or the data's answers, may be wrong"
    if progress.successes == progress.fresh_groups:
        return "every answer is right: the questions are too easy"
    if progress.successes:
        return "each question is solved always or never: none is of moderate difficulty"
    return (
        "every answer is wrong: the reward may not find the answer (its answer_pattern), completions may be "
        "cut short (rollout.max_completion_length), or the questions are too hard for the model"
    )


def _refuse_many_skips(training: TrainingConfig, progress: Progress) -> None:
    if progress.steps_with_skips > training.max_steps_with_skips:
        raise NonFiniteError(
            f"step {progress.step}: something that is not finite was skipped in {progress.steps_with_skips} "
            f"steps in a row (training.max_steps_with_skips {training.max_steps_with_skips}); look at the "
            "warnings and at the batches in non_finite/, lower training.learning_rate, or set model.dtype to "
            "float32"
        )


def _set_up(
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
        parts.estimator.start(
            tuple(pool.train.values()), lambda texts: encode_with(policy, texts, context.progress)
        )
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


def _refuse_to_go_back(recipe: Recipe, progress: Progress, checkpoint: Path) -> None:
    if progress.step > recipe.training.max_steps:
        raise ResumeError(
            f"{checkpoint}: the run is at step {progress.step}, past training.max_steps "
            f"{recipe.training.max_steps}; raise it, or give another name=... to start afresh"
        )


def _refuse_small_pool(recipe: Recipe, pool: Pool) -> None:
    arithmetic = recipe.arithmetic()
    needed = max(arithmetic.questions_per_plan, arithmetic.reference_size)
    if len(pool.train) < needed:
        raise DataError(
            f"a plan asks {arithmetic.questions_per_plan} questions (training.questions_per_step x "
            f"training.selection_interval) and {arithmetic.reference_size} references, "
            f"but {len(pool.train)} training questions are left; lower these or give more data"
        )


def _context(recipe: Recipe, folder: Path, hooks: pluggy.PluginManager, progress: Progress) -> Context:
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


@contextmanager
def saying_how_to_go_on(folder: Path, registry: Registry) -> Iterator[None]:
    """Add to whatever ends a run early what is left of it."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            for place in _places_outside(error, registry):
                error.add_note(f"raised in {place}")
        if has_begun(folder) and not isinstance(error, ResumeError):
            found = checkpoints_of(folder)
            whole = next((path for path in found if damage_of(path, reads_all=False) is None), None)
            where = f"goes on from {whole.name}" if whole else "starts over: no checkpoint yet"
            error.add_note(f"{folder}: the same command with --resume {where}")
        raise


def _places_outside(error: BaseException, registry: Registry) -> list[str]:
    """Find where an error passed through a plugin of the user: ``plugins/mine.py:12, in score``."""
    files = {origin.path for origin in registry.origins() if origin.path and origin.label != "built-in"}
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if Path(frame.filename) in files]
    return [f"{frame.filename}:{frame.lineno}, in {frame.name}" for frame in outside]


@contextmanager
def _listening(parts: Parts, hooks: pluggy.PluginManager) -> Iterator[None]:
    """Let the trackers hear the hooks while the run goes."""
    for tracker in parts.trackers:
        hooks.register(tracker, name=f"tracker {tracker.config.type}")
    try:
        yield
    finally:
        for tracker in parts.trackers:
            hooks.unregister(tracker)


def _run_report(setup: Setup, progress: Progress) -> RunReport:
    return RunReport(
        name=setup.recipe.name,
        run_folder=setup.context.run_folder,
        device=setup.context.device,
        num_parameters=sum(parameter.numel() for parameter in setup.policy.module.parameters()),
        num_trainable_parameters=num_trainable(setup.policy.module),
        num_processes=setup.member.processes.count,
        num_train_questions=len(setup.pool.train),
        num_evaluation_questions=len(setup.pool.evaluation),
        left_out=setup.pool.left_out,
        arithmetic=setup.arithmetic,
        first_step=progress.step,
    )


def _summary(setup: Setup, progress: Progress) -> RunSummary:
    return RunSummary(
        name=setup.recipe.name,
        run_folder=setup.context.run_folder,
        steps=progress.step,
        success_rate_before=progress.success_rate_before,
        success_rate_after=progress.success_rate_after,
        informative_fraction=progress.informative_fraction,
        reference_pearson=progress.reference_pearson,
        seconds_by_stage=dict(setup.meter.seconds),
        tokens_by_purpose=dict(setup.meter.tokens),
        reward_statuses=dict(setup.meter.reward_statuses),
        left_out=setup.pool.left_out,
        warnings=tuple(progress.warnings),
    )
