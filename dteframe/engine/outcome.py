"""What is said of a run when it begins, when it learns nothing, when it ends, and when it ends early."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dteframe.engine.checkpoint_folder import checkpoints_of, damage_of
from dteframe.engine.meter import Meter
from dteframe.engine.model_options import num_trainable
from dteframe.engine.progress import Progress
from dteframe.engine.run_folder import has_begun
from dteframe.engine.setup import Setup
from dteframe.errors import ResumeError
from dteframe.registry import Registry
from dteframe.reports import RunReport, RunSummary


def run_report(setup: Setup, progress: Progress) -> RunReport:
    """Say what runs where."""
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


def summary_of(setup: Setup, progress: Progress) -> RunSummary:
    """Say how a run ended."""
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


def likely_cause(progress: Progress, meter: Meter) -> str:
    """Say why nothing was learnt so far."""
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
