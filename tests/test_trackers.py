"""Trackers: what a run leaves in its files and shows on stderr."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pluggy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dteframe import BatchArithmetic, Completion, Context, Group, ResumeError, SuccessEstimate, hookspecs
from dteframe.reports import (
    AnswerReport,
    CostReport,
    EstimateReport,
    EvaluationReport,
    ForecastReport,
    GroupsReport,
    PlanReport,
    ReplayReport,
    ReviewReport,
    RunReport,
    RunSummary,
    StepReport,
    TimeReport,
    UpdateReport,
)
from dteframe.trackers.console import Console, ConsoleConfig
from dteframe.trackers.jsonl import Jsonl, JsonlConfig
from dteframe.trackers.tensorboard import TensorBoard, TensorBoardConfig


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def context(tmp_path: Path, warnings: list[str]) -> Context:
    return Context(
        tmp_path, tmp_path, "cpu", 0, progress=lambda what, done, total: None, warn=warnings.append
    )


def hooks_of(tracker) -> pluggy.HookRelay:
    """Register a tracker as the engine does: hook names and arguments are checked."""
    manager = pluggy.PluginManager("dteframe")
    manager.add_hookspecs(hookspecs)
    manager.register(tracker)
    manager.check_pending()
    return manager.hook


def run_report(folder: Path, first_step: int = 0) -> RunReport:
    arithmetic = BatchArithmetic(4, 2, 2, 1, 0, 0, 16, 16)
    left_out = {"duplicate": 3}
    return RunReport("demo", folder, "cpu", 1, 612_000, 612_000, 100, 8, left_out, arithmetic, first_step)


def group(purpose: str = "train", reward: float = 0.5) -> Group:
    tokens = np.array([5, 6, 7])
    right = Completion(tokens, np.array([-0.1, -0.2, -0.3]), "stop", "14")
    cut = Completion(tokens[:2], np.array([-0.1, -0.2]), "length", "zwölf ```")
    parts = {"exact_match": np.array([1.0, 0.0]), "format": np.array([reward, 0.0])}
    return Group("q-1", np.array([1, 2]), (right, cut), np.array([reward, 0.0]), 1, 3, purpose, parts)


def groups_report(step: int, *groups: Group, is_replayed: bool = False) -> GroupsReport:
    return GroupsReport(
        step, groups, {"q-1": "7 + 7 ="}, {"q-1": "14"}, is_replayed, {"q-1": "seven and seven"}
    )


def plan_report(step: int) -> PlanReport:
    estimate = SuccessEstimate(("q-1", "q-2"), np.array([0.5, 0.25]), np.array([8.0, 0.0]))
    figures = EstimateReport(2, 0.5, 1.0, None, None, 0.4, 0.375, 2, 1, {"leave_one_out_pearson": 0.75})
    return PlanReport(step, ("q-2", "q-1"), ("q-1",), estimate, figures)


def with_forecasts(report: StepReport) -> StepReport:
    forecasts = ForecastReport(64, 40, 50, 0.8, 0.6, 0.5, 0.75, 0.45, 0.125, 0.025, 0.6, 0.69, 0.9, 0.2)
    costs = CostReport(1200, 0, 300, 100, 80, 20, 10, 8.0, 7.0, 6.0, 1.5, 0.2, 0.1)
    return replace(report, stages=(*report.stages, forecasts, costs))


def step_report(step: int, loss: float = 0.125, pearson: float | None = None) -> StepReport:
    estimate = EstimateReport(2, 0.5, 1.0, pearson, None, 0.4, 0.375, 2, 1)
    answer = AnswerReport(2, 0, 0.5, 0.5, 0.25, 0.75, 0.25, None, None, 12.5, 16, 0.0)
    update = UpdateReport(loss, 1.0, 1e-6, 1, 0, 4, 0, 0.5, None)
    return StepReport(step, 4, (estimate, answer, update, TimeReport(2.0)))


def summary(folder: Path) -> RunSummary:
    seconds = {"generate_seconds": 6.0, "update_seconds": 2.0, "score_seconds": 0.0}
    tokens = {"train": 1200, "reference": 300, "evaluation": 100}
    return RunSummary(
        "demo",
        folder,
        4,
        0.25,
        0.5,
        0.625,
        0.71,
        seconds,
        tokens,
        {"scored": 9, "timeout": 1},
        {"duplicate": 3},
        ("2 prompts were long",),
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_one_flat_row_of_metrics_with_exact_floats(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    hooks.dteframe_step_finished(report=step_report(1, loss=0.1 + 0.2))
    assert rows(tmp_path / "metrics.jsonl") == [step_report(1, loss=0.30000000000000004).metrics()]


def test_a_rollout_row_holds_question_answer_and_every_completion(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    hooks.dteframe_groups_scored(groups=groups_report(4, group()))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    parts = [{"exact_match": 1.0, "format": 0.5}, {"exact_match": 0.0, "format": 0.0}]
    assert rows(tmp_path / "rollouts.jsonl") == [
        {
            "step": 4,
            "purpose": "train",
            "is_replayed": False,
            "question_id": "q-1",
            "policy_version": 3,
            "successes": 1,
            "trials": 2,
            "prompt": "7 + 7 =",
            "answer": "14",
            "completions": [
                {
                    "text": "14",
                    "reward": 0.5,
                    "reward_parts": parts[0],
                    "num_tokens": 3,
                    "finish_reason": "stop",
                },
                {
                    "text": "zwölf ```",
                    "reward": 0.0,
                    "reward_parts": parts[1],
                    "num_tokens": 2,
                    "finish_reason": "length",
                },
            ],
        }
    ]


def test_a_replayed_group_is_named_by_question_and_version_alone(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    hooks.dteframe_groups_scored(groups=groups_report(5, group(), is_replayed=True))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    [row] = rows(tmp_path / "rollouts.jsonl")
    assert (row["question_id"], row["policy_version"], row["is_replayed"]) == ("q-1", 3, True)
    assert "completions" not in row


@pytest.mark.parametrize(
    ("rollouts", "written"),
    [("all", ["train", "reference", "evaluation", "train"]), ("fresh", ["train"]), ("none", [])],
)
def test_the_rollouts_option_says_which_groups_are_written(context, tmp_path, rollouts, written):
    hooks = hooks_of(Jsonl(JsonlConfig(rollouts=rollouts), context))
    for purpose in ("train", "reference", "evaluation"):
        hooks.dteframe_groups_scored(groups=groups_report(1, group(purpose)))
    hooks.dteframe_groups_scored(groups=groups_report(1, group(), is_replayed=True))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    path = tmp_path / "rollouts.jsonl"
    assert [row["purpose"] for row in (rows(path) if path.exists() else [])] == written


def test_rollouts_every_third_step_are_those_of_steps_0_3_and_6(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(rollouts_every=3), context))
    for step in range(8):
        hooks.dteframe_groups_scored(groups=groups_report(step, group()))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    assert [row["step"] for row in rows(tmp_path / "rollouts.jsonl")] == [0, 3, 6]


def test_a_selection_row_gives_the_estimate_in_the_order_of_asking(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    hooks.dteframe_plan_made(plan=plan_report(3))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    [row] = rows(tmp_path / "selections.jsonl")
    assert row["question_ids"] == ["q-2", "q-1"]
    assert row["predicted_success_rates"] == [0.25, 0.5]
    assert row["evidence_rollouts"] == [0.0, 8.0]
    assert row["reused_reference_ids"] == ["q-1"]
    assert row["estimate/leave_one_out_pearson"] == 0.75


def test_a_plan_that_reused_references_fill_chooses_nothing(context, tmp_path):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    figures = EstimateReport(2, 0.5, 1.0, None, None, 0.4, None, 0, 2)
    nothing = SuccessEstimate((), np.array([]), np.array([]))
    hooks.dteframe_plan_made(plan=PlanReport(3, (), ("q-1", "q-2"), nothing, figures))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    [row] = rows(tmp_path / "selections.jsonl")
    assert (row["question_ids"], row["predicted_success_rates"]) == ([], [])


def test_a_number_that_is_not_finite_becomes_null_and_is_warned_of_once(context, tmp_path, warnings):
    hooks = hooks_of(Jsonl(JsonlConfig(), context))
    hooks.dteframe_step_finished(report=step_report(1, loss=float("nan")))
    hooks.dteframe_step_finished(report=step_report(2, loss=float("inf")))
    assert [row["update/loss"] for row in rows(tmp_path / "metrics.jsonl")] == [None, None]
    assert warnings == [
        "metrics.jsonl: update/loss is not finite at step 1; it is written as null, here and later"
    ]


def test_files_are_cut_back_to_the_checkpoint(context, tmp_path):
    stopped = Jsonl(JsonlConfig(), context)
    stopped.dteframe_plan_made(plan_report(1))
    stopped.dteframe_step_finished(step_report(1))
    state = stopped.state_dict()
    stopped.dteframe_step_finished(step_report(2))
    resumed = Jsonl(JsonlConfig(), context)
    resumed.load_state_dict(state)
    resumed.dteframe_step_finished(step_report(2))
    resumed.dteframe_step_finished(step_report(3))
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(rows(tmp_path / "selections.jsonl")) == 1


def test_a_file_that_lost_rows_stops_the_resume(context, tmp_path):
    tracker = Jsonl(JsonlConfig(), context)
    tracker.dteframe_step_finished(step_report(1))
    state = tracker.state_dict()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ResumeError) as caught:
        Jsonl(JsonlConfig(), context).load_state_dict(state)
    length = state["bytes"]["metrics.jsonl"]
    assert str(caught.value) == (
        f"{tmp_path / 'metrics.jsonl'}: has 3 bytes but had {length} at the checkpoint: rows were lost; "
        "restore the file or start a new run"
    )


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_metric_is_a_curve_under_its_own_name(context, tmp_path):
    hooks = hooks_of(TensorBoard(TensorBoardConfig(), context))
    hooks.dteframe_run_started(run=run_report(tmp_path))
    hooks.dteframe_step_finished(report=step_report(1))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(step_report(1).metrics()) - {"step"}
    assert scalars(tmp_path, "update/loss") == [(1, 0.125)]


def test_points_of_a_stopped_run_vanish_when_it_is_resumed(context, tmp_path):
    for first_step, values in ((0, {1: 1.0, 2: 2.0, 3: 4.0}), (1, {2: 8.0})):
        tracker = TensorBoard(TensorBoardConfig(), context)
        tracker.dteframe_run_started(run_report(tmp_path, first_step))
        for step, loss in values.items():
            tracker.dteframe_step_finished(step_report(step, loss=loss))
        tracker.dteframe_run_finished(summary(tmp_path))
    assert scalars(tmp_path, "update/loss") == [(1, 1.0), (2, 8.0)]


def test_samples_are_shown_literally_whatever_the_completion_says(context, tmp_path):
    hooks = hooks_of(TensorBoard(TensorBoardConfig(num_sample_completions=1), context))
    hooks.dteframe_run_started(run=run_report(tmp_path))
    hooks.dteframe_plan_made(plan=plan_report(1))
    hooks.dteframe_groups_scored(groups=groups_report(1, group(), group()))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [event] = events.Tensors("samples/train/text_summary")
    assert event.tensor_proto.string_val[0].decode() == (
        "question q-1, success rate 0.5\n\n    7 + 7 =\n\n"
        "completion, reward 0.5\n\n    14\n\nanswer\n\n    14"
    )
    [predicted] = events.Histograms("histogram/predicted_success_rate")
    assert (predicted.histogram_value.num, predicted.histogram_value.sum) == (2, 0.75)
    [measured] = events.Histograms("histogram/measured_success_rate")
    assert (measured.histogram_value.num, measured.histogram_value.sum) == (2, 1.0)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.rstrip() for line in captured.err.splitlines()]


def test_where_a_part_is_trained_the_first_line_says_how_much(context, tmp_path, capsys):
    hooks = hooks_of(Console(ConsoleConfig(), context))
    hooks.dteframe_run_started(run=replace(run_report(tmp_path), num_trainable_parameters=61_200))
    first = "demo: 0.612M parameters, 0.0612M of them (10.0%) trained, on cpu; 100 training and 8 held-out"
    assert lines_of(capsys)[0] == f"{first} questions"


def test_without_a_terminal_a_run_reads_as_plain_lines(context, tmp_path, capsys):
    hooks = hooks_of(Console(ConsoleConfig(), context))
    hooks.dteframe_progress(what="warming up", done=1, total=500)
    hooks.dteframe_run_started(run=run_report(tmp_path))
    hooks.dteframe_evaluated(step=0, evaluation=EvaluationReport(0.25, 0.05, 0.5, 8, 4, 11.0, 0.0))
    hooks.dteframe_step_finished(report=with_forecasts(step_report(1)))
    hooks.dteframe_step_finished(report=step_report(2))
    hooks.dteframe_warned(message="q-7: no [answer]")
    assert lines_of(capsys) == [
        "demo: 0.612M parameters on cpu; 100 training and 8 held-out questions",
        "left out: duplicate 3",
        "held-out at step 0: success rate 0.250 +- 0.050, solved 0.500 (8 questions x 4, 11.0 tokens each)",
        "     step  reward success informative uniform estimator r  slope      loss length seconds    left",
        "      1/4   0.500   0.250        0.75    0.60        0.50   0.90  1.25e-01   12.5    2.00      6s",
        "      2/4   0.500   0.250        0.75       -           -      -  1.25e-01   12.5    2.00      4s",
        "warning: q-7: no [answer]",
    ]


def test_below_a_row_stands_what_was_turned_away_and_how_replayed_tokens_do(context, capsys):
    review = ReviewReport(2, 9, 4, 3, 2, 0, 120)
    replayed = ReplayReport(4, 9, 0.5, 1.5, 2)
    figures = {
        "replayed_effective_sample_fraction": 0.912,
        "replayed_kl_behaviour_nats": 0.0404,
        "clip_fraction": 0.08,
    }
    plain = step_report(1)
    update = next(stage for stage in plain.stages if isinstance(stage, UpdateReport))
    stages = [stage for stage in plain.stages if stage is not update]
    hooks = hooks_of(Console(ConsoleConfig(), context))
    stages += [replace(update, figures=figures), review, replayed]
    hooks.dteframe_step_finished(report=replace(plain, stages=tuple(stages)))
    assert lines_of(capsys)[-1] == (
        "          review in 2 rounds: 9 asked, 4 accepted, 3 rejected, 2 surplus, 0 missing; "
        "replay of 4 groups: tokens worth 0.91, KL 0.040, clipped 0.08, share 0.50"
    )


def test_below_a_row_stands_what_was_expected_of_a_choice(context, capsys):
    plain = step_report(1)
    figures = {"coverage_questions": 8.0, "expected_gain": 1.043}
    stages = [
        replace(stage, figures=figures) if isinstance(stage, EstimateReport) else stage
        for stage in plain.stages
    ]
    hooks = hooks_of(Console(ConsoleConfig(), context))
    hooks.dteframe_step_finished(report=replace(plain, stages=tuple(stages)))
    assert lines_of(capsys)[-1] == (
        "          plan: expected gain of choosing 1.04, 8 questions drawn uniformly"
    )


def test_the_summary_says_what_the_run_came_to(context, tmp_path, capsys):
    hooks_of(Console(ConsoleConfig(), context)).dteframe_run_finished(summary=summary(tmp_path))
    assert lines_of(capsys) == [
        "",
        "demo: 4 steps",
        "  held-out success rate  0.250 before, 0.500 after (+0.250)",
        "  informative groups     62.5%",
        "  estimator correlation  0.71 with measured success rates of references",
        "  tokens generated       train 1200, reference 300, evaluation 100",
        "  completions            scored 9, timeout 1",
        "  questions left out     duplicate 3",
        "  warnings               1",
        "                         2 prompts were long",
        "  seconds                8.0 in all",
        "                               6.0   75.0%  generate_seconds",
        "                               2.0   25.0%  update_seconds",
        f"  policy                 {tmp_path / 'policy'}",
    ]


def test_a_run_without_references_has_no_line_of_them(context, tmp_path, capsys):
    without = replace(summary(tmp_path), reference_pearson=None)
    hooks_of(Console(ConsoleConfig(), context)).dteframe_run_finished(summary=without)
    assert not [line for line in lines_of(capsys) if "estimator correlation" in line]


def test_the_summary_says_how_the_newest_forecasts_held_and_what_references_took(context, tmp_path, capsys):
    hooks = hooks_of(Console(ConsoleConfig(), context))
    hooks.dteframe_step_finished(report=with_forecasts(step_report(4)))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    lines = lines_of(capsys)
    first = next(place for place, line in enumerate(lines) if "newest forecasts" in line)
    assert lines[first : first + 3] == [
        "  newest forecasts       64 groups: r 0.50 (at best 0.75), slope 0.90 +- 0.20, Brier 0.125 "
        "(at best 0.025), nats a rollout 0.600 (a constant 0.690)",
        "  newest informative     80.0% of chosen, 60.0% of uniformly drawn groups",
        "  references             20 rollouts, 300 tokens, 1.5 s",
    ]


def test_rows_of_every_third_step_still_include_the_first_and_the_last(context, tmp_path, capsys):
    hooks = hooks_of(Console(ConsoleConfig(every=3), context))
    for step in (1, 2, 3, 4):
        hooks.dteframe_step_finished(report=step_report(step))
    assert [line.split()[0] for line in lines_of(capsys)] == ["step", "1/4", "3/4", "4/4"]


def test_a_terminal_gets_bars_and_its_cursor_back(context, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    hooks = hooks_of(Console(ConsoleConfig(), context))
    hooks.dteframe_progress(what="warming up", done=1, total=500)
    hooks.dteframe_run_started(run=run_report(tmp_path))
    hooks.dteframe_progress(what="warming up", done=500, total=500)
    hooks.dteframe_step_finished(report=step_report(1))
    hooks.dteframe_run_finished(summary=summary(tmp_path))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warming up" in captured.err and "6s left" in captured.err
    assert captured.err.rfind("\x1b[?25h") > captured.err.rfind("\x1b[?25l") >= 0


def test_the_console_ends_long_work_with_a_line_and_short_work_without(context, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    console = Console(ConsoleConfig(), context)
    console.dteframe_progress("warming up", 0, 2)
    clock[0] = 11.0
    console.dteframe_progress("warming up", 1, 2)
    console.dteframe_progress("warmed up to 0.1 nats", 2, 2)
    console.dteframe_progress("generating", 0, 2)
    console.dteframe_progress("generating", 2, 2)
    assert capsys.readouterr().err.splitlines() == ["warming up: 1 of 2", "warmed up to 0.1 nats"]
