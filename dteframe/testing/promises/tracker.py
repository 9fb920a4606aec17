"""What every tracker promises; checked with the reports of a made-up run of two steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pluggy

from dteframe import hookspecs
from dteframe.contracts import Tracker
from dteframe.records import BatchArithmetic, SuccessEstimate
from dteframe.reports import (
    AnswerReport,
    CostReport,
    EstimateReport,
    EvaluationReport,
    GroupsReport,
    PlanReport,
    ReplayReport,
    RunReport,
    RunSummary,
    StepReport,
    TimeReport,
    UpdateReport,
)
from dteframe.testing.promises.every_kind import state_comes_back
from dteframe.testing.subject import Subject, copy_of_state, group_of, insist

MAX_STEPS = 2


def watches_at_least_one_hook(subject: Subject) -> None:
    """A tracker implements watching hooks as methods with ``@hookimpl``, spelt as in hookspecs.py."""
    manager = pluggy.PluginManager("dteframe")
    manager.add_hookspecs(hookspecs)
    tracker: Tracker = subject.make()
    manager.register(tracker)
    manager.check_pending()
    insist(bool(manager.get_hookcallers(tracker)), "no method is marked with @hookimpl")


def every_hook_is_survived(subject: Subject) -> None:
    """A whole run can be watched: with and without evaluation, replay, references, and after a warning."""
    with _listening(subject.make()) as hooks:
        _tell_of_a_run(hooks, subject.folder / "run", first_step=0)


def hooks_return_nothing(subject: Subject) -> None:
    """Hooks watch: whatever they return would be lost."""
    with _listening(subject.make()) as hooks:
        answers = _tell_of_a_run(hooks, subject.folder / "run", first_step=0)
    insist(not answers, f"a hook returned {answers[:1]}")


def stdout_is_left_alone(subject: Subject) -> None:
    """What the command prints on stdout is data (``--json``): talk on stderr, write to files."""
    heard = io.StringIO()
    with redirect_stdout(heard), _listening(subject.make()) as hooks:
        _tell_of_a_run(hooks, subject.folder / "run", first_step=0)
    insist(not heard.getvalue(), f"wrote {heard.getvalue()[:60]!r} to stdout")


def a_resumed_run_can_be_watched(subject: Subject) -> None:
    """A new tracker in the folder of a stopped run takes the state back and watches the rest."""
    run = subject.folder / "run"
    first: Tracker = subject.make()
    with _listening(first) as hooks:
        _tell_of_a_run(hooks, run, first_step=0, last_step=1)
        state = copy_of_state(first)
    second: Tracker = subject.make()
    second.load_state_dict(state)
    with _listening(second) as hooks:
        _tell_of_a_run(hooks, run, first_step=1)


@contextmanager
def _listening(tracker: Tracker) -> Iterator[pluggy.PluginManager]:
    manager = pluggy.PluginManager("dteframe")
    manager.add_hookspecs(hookspecs)
    manager.register(tracker)
    yield manager


def _tell_of_a_run(
    manager: pluggy.PluginManager, run_folder: Path, first_step: int, last_step: int = MAX_STEPS
) -> list[object]:
    """Call every hook as the engine does; give what the hooks returned, which should be nothing."""
    answers: list[object] = []

    def tell(hook: Callable[..., list[object]], **reports: object) -> None:
        with redirect_stderr(io.StringIO()):  # what a tracker says there is its own affair
            answers.extend(hook(**reports))

    hook = manager.hook
    tell(hook.dteframe_run_started, run=_run_report(run_folder, first_step))
    if first_step == 0:
        tell(hook.dteframe_evaluated, step=0, evaluation=_evaluation())
        tell(hook.dteframe_step_finished, report=StepReport(0, MAX_STEPS, (_evaluation(), _time(), _cost())))
    for step in range(first_step + 1, last_step + 1):
        for done in (0, 2, 4):
            tell(hook.dteframe_progress, what="generating", done=done, total=4)
        tell(hook.dteframe_warned, message="1 completion was cut at 8 tokens [made up]")
        if step == 1:
            tell(hook.dteframe_plan_made, plan=_plan())
        for is_replayed in (False, True) if step == MAX_STEPS else (False,):
            tell(hook.dteframe_groups_scored, groups=_groups(step, is_replayed))
        stages = [_estimate()] if step == 1 else []
        evaluations = [_evaluation()] if step == MAX_STEPS else []
        if evaluations:
            tell(hook.dteframe_evaluated, step=step, evaluation=evaluations[0])
        report = StepReport(
            step, MAX_STEPS, (*stages, _answer(), _replay(step), _update(), *evaluations, _time(), _cost())
        )
        tell(hook.dteframe_step_finished, report=report)
    if last_step == MAX_STEPS:
        tell(hook.dteframe_run_finished, summary=_summary(run_folder))
    return answers


def _run_report(run_folder: Path, first_step: int) -> RunReport:
    return RunReport(
        name="made-up",
        run_folder=run_folder,
        device="cpu",
        num_parameters=1000,
        num_trainable_parameters=100,
        num_processes=1,
        num_train_questions=24,
        num_evaluation_questions=8,
        left_out={"longer than 512 tokens": 1},
        arithmetic=BatchArithmetic(MAX_STEPS, 2, 4, 2, 1, 2, 512, 8),
        first_step=first_step,
    )


def _plan() -> PlanReport:
    ids = ("sum-000", "sum-001", "sum-002")
    estimate = SuccessEstimate(ids, np.array([0.25, 0.5, 0.75]), np.array([8.0, 0.0, 4.0]))
    return PlanReport(1, ids, ("sum-009",), estimate, _estimate())


def _groups(step: int, is_replayed: bool) -> GroupsReport:
    groups = tuple(group_of(f"sum-00{place}", place, policy_version=step - 1) for place in range(3))
    texts = {group.question_id: f"[made] up {group.question_id}" for group in groups}
    return GroupsReport(step, groups, texts, texts, is_replayed, texts)


def _estimate() -> EstimateReport:
    return EstimateReport(
        num_references=2,
        reference_success_rate=0.5,
        reference_informative_fraction=1.0,
        reference_pearson=None,
        reference_brier=None,
        mean_success_rate=0.5,
        selected_mean_success_rate=0.5,
        num_selected=3,
        num_reused_references=1,
        figures={"made_up_figure": 0.5},
    )


def _answer() -> AnswerReport:
    return AnswerReport(
        num_groups=2,
        num_shortfall_groups=1,
        reward_mean=0.5,
        reward_std=0.5,
        success_rate=0.5,
        informative_fraction=0.5,
        equal_reward_fraction=0.5,
        predicted_pearson=None,
        predicted_brier=0.25,
        completion_length_mean_tokens=4.5,
        completion_length_max_tokens=8,
        truncated_fraction=0.125,
    )


def _replay(step: int) -> ReplayReport:
    if step == 1:
        return ReplayReport(0, 0, 1.0, None, None)
    return ReplayReport(1, 2, 1.0, 1.0, 1)


def _update() -> UpdateReport:
    return UpdateReport(
        loss=0.01,
        gradient_norm=0.5,
        learning_rate=1e-3,
        num_optimizer_steps=1,
        num_equal_reward_groups=1,
        num_forward_rows=4,
        num_proximal_rows=4,
        entropy_nats=0.25,
        sampler_logprob_difference_max_nats=1e-6,
        figures={"made_up_figure": 0.5},
    )


def _evaluation() -> EvaluationReport:
    return EvaluationReport(
        success_rate=0.25,
        standard_error=0.05,
        solved_fraction=0.5,
        num_questions=8,
        num_generations=4,
        completion_length_mean_tokens=4.5,
        truncated_fraction=0.0,
    )


def _time() -> TimeReport:
    return TimeReport(1.5, {"generate_seconds": 1.0, "other_seconds": 0.5})


def _cost() -> CostReport:
    return CostReport(
        train_tokens=100,
        unused_tokens=10,
        reference_tokens=50,
        evaluation_tokens=25,
        train_rollouts=8,
        reference_rollouts=8,
        evaluation_rollouts=32,
        total_seconds=3.0,
        training_seconds=2.0,
        training_cpu_seconds=1.5,
        reference_seconds=0.4,
        predict_seconds=0.1,
        select_seconds=0.05,
    )


def _summary(run_folder: Path) -> RunSummary:
    return RunSummary(
        name="made-up",
        run_folder=run_folder,
        steps=MAX_STEPS,
        success_rate_before=0.25,
        success_rate_after=0.5,
        informative_fraction=0.5,
        reference_pearson=None,
        seconds_by_stage={"generate": 2.0, "other": 1.0},
        tokens_by_purpose={"train": 100, "reference": 50, "evaluation": 25},
        reward_statuses={"scored": 20, "unparseable": 4, "timeout": 1},
        left_out={"longer than 512 tokens": 1},
        warnings=("1 completion was cut at 8 tokens [made up]",),
    )


PROMISES = (
    state_comes_back,
    watches_at_least_one_hook,
    every_hook_is_survived,
    hooks_return_nothing,
    stdout_is_left_alone,
    a_resumed_run_can_be_watched,
)
