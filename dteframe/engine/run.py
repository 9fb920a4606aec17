"""A run from its recipe to its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pluggy
import transformers

from dteframe.assemble import Parts, assemble
from dteframe.contracts import Context
from dteframe.engine.advice import advise
from dteframe.engine.checkpoint import (
    Finishing,
    finishing_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_policy,
)
from dteframe.engine.checkpoint_folder import newest_checkpoint, step_of
from dteframe.engine.disk import disk_for
from dteframe.engine.distributed import ALONE, Processes
from dteframe.engine.evaluate import evaluate
from dteframe.engine.non_finite import NonFiniteError
from dteframe.engine.outcome import likely_cause, run_report, saying_how_to_go_on, summary_of
from dteframe.engine.progress import Progress
from dteframe.engine.reward_pool import Scorer, scoring
from dteframe.engine.run_folder import (
    changed_plugins,
    check_run_folder,
    clear_run_folder,
    has_begun,
    locked,
    write_run_folder,
    write_summary,
)
from dteframe.engine.setup import Setup
from dteframe.engine.start import context_of, set_up
from dteframe.engine.step import training_step
from dteframe.engine.stop import Stop, StoppedError
from dteframe.engine.throughput import throughput_of
from dteframe.errors import ResumeError
from dteframe.recipe import LoadedRecipe, Recipe, TrainingConfig
from dteframe.registry import Registry
from dteframe.reports import RunSummary, StageReport, StepReport

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
    context = context_of(recipe, folder, registry.hooks, progress)
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
            registry.hooks.hook.dteframe_run_started(run=run_report(setup, progress))
            try:
                with finishing_checkpoints() as finishing:
                    _train(setup, progress, stop or Stop(), finishing)
            except StoppedError:
                processes.broadcast(None)  # The others have no part in what comes of it.
                raise
            with setup.meter.stage("checkpoint"):
                save_policy(setup)
            processes.broadcast(None)  # Nothing more is to be done.
            setup.meter.close_step()
            summary = summary_of(setup, progress)
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
    elif step_of(checkpoint) > recipe.training.max_steps:
        raise ResumeError(
            f"{checkpoint}: the run is at step {step_of(checkpoint)}, past training.max_steps "
            f"{recipe.training.max_steps}; raise it, or give another name=... to start afresh"
        )
    setup = set_up(recipe, context, parts, registry.hooks, processes, scorer)
    if checkpoint is not None:
        with setup.meter.stage("load"):
            load_checkpoint(setup, progress, checkpoint)
    write_run_folder(folder, recipe, registry, progress.step)
    return setup


def _train(setup: Setup, progress: Progress, stop: Stop, finishing: Finishing) -> None:
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
        finishing.look()
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
                    save_checkpoint(setup, progress, finishing)
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
            f"learnt: {likely_cause(progress, setup.meter)}; look at "
            f"{setup.context.run_folder / 'rollouts.jsonl'}"
        )
    for message in progress.health.look_at(report, setup.recipe.training.health):
        setup.context.warn(message)
    setup.hooks.hook.dteframe_step_finished(report=report)
    _refuse_many_skips(setup.recipe.training, progress)


def _refuse_many_skips(training: TrainingConfig, progress: Progress) -> None:
    if progress.steps_with_skips > training.max_steps_with_skips:
        raise NonFiniteError(
            f"step {progress.step}: something that is not finite was skipped in {progress.steps_with_skips} "
            f"steps in a row (training.max_steps_with_skips {training.max_steps_with_skips}); look at the "
            "warnings and at the batches in non_finite/, lower training.learning_rate, or set model.dtype to "
            "float32"
        )


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
