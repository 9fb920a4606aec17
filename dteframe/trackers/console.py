"""Show a run on stderr: bars and a table of steps on a terminal, plain lines anywhere else."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from typing import Literal, final

from pydantic import Field
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dteframe.contracts import Component, Context, Tracker, TrackerConfig
from dteframe.hookspecs import hookimpl
from dteframe.reports import EvaluationReport, MetricValue, RunReport, RunSummary, StepReport

COLUMNS = (
    *("step", "reward", "success", "informative", "uniform", "estimator r", "slope"),
    *("loss", "length", "seconds", "left"),
)
WIDTHS = (9, 7, 7, 11, 7, 11, 6, 9, 6, 7, 7)
ROWS_PER_HEADER = 20
SECONDS_BETWEEN_PROGRESS_LINES = 10.0
"""Long enough that a log is readable, short enough that nobody thinks it hangs."""


class ConsoleConfig(TrackerConfig):
    """Options of ``console``."""

    type: Literal["console"] = "console"
    every: int = Field(default=1, ge=1)
    """Print the row of every n-th step; the first, the last, evaluations and warnings are always printed."""


@final
class Console(Tracker):
    """Progress, a row per step and a summary on stderr."""

    config: ConsoleConfig

    def __init__(self, config: ConsoleConfig, context: Context) -> None:
        """Prepare the bars; they appear with the first thing to show."""
        super().__init__(config, context)
        self._console = RichConsole(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # stdout is data and must not pass through the terminal's bars
            disable=not self._console.is_terminal,
        )
        self._work: TaskID | None = None
        self._run: TaskID | None = None
        self._last_line = time.monotonic()
        self._work_began: float | None = None
        self._num_rows = 0
        self._first_step = 0
        self._seconds_here = 0.0
        self._last_row: Mapping[str, MetricValue] = {}

    @hookimpl
    def dteframe_run_started(self, run: RunReport) -> None:
        """Say what runs where."""
        self._first_step = run.first_step
        size = f"{run.num_parameters / 1e6:.3g}M parameters"
        if run.num_trainable_parameters < run.num_parameters:
            share = run.num_trainable_parameters / run.num_parameters
            size += f", {run.num_trainable_parameters / 1e6:.3g}M of them ({share:.1%}) trained,"
        size += f" on {run.device}"
        if run.num_processes > 1:
            size += f", {run.num_processes} processes"
        questions = (
            f"{run.num_train_questions} training and {run.num_evaluation_questions} held-out questions"
        )
        self._say(f"{run.name}: {size}; {questions}")
        if run.left_out:
            self._say(f"left out: {_counts(run.left_out)}")
        if run.first_step > 0:
            self._say(f"resumed after step {run.first_step}")
        self._show_bars()
        steps = run.arithmetic.max_steps
        self._run = self._bars.add_task("steps", total=steps, completed=run.first_step, left="")

    @hookimpl
    def dteframe_progress(self, what: str, done: int, total: int) -> None:
        """Show how far long work is: a bar, or a line now and then; and a line when it has ended."""
        now = time.monotonic()
        if self._work_began is None:
            self._work_began = now
        if done >= total:
            if now - self._work_began >= SECONDS_BETWEEN_PROGRESS_LINES:
                self._say(what)
            self._work_began = None
        if self._console.is_terminal:
            self._show_bars()
            if self._work is None:
                self._work = self._bars.add_task(what, total=total, left="")
            self._bars.update(self._work, description=what, completed=done, total=total, visible=done < total)
        elif done < total and now - self._last_line >= SECONDS_BETWEEN_PROGRESS_LINES:
            self._say(f"{what}: {done} of {total}")

    @hookimpl
    def dteframe_warned(self, message: str) -> None:
        """Pass a warning on at once."""
        self._say(f"warning: {message}", style="yellow")

    @hookimpl
    def dteframe_evaluated(self, step: int, evaluation: EvaluationReport) -> None:
        """Print the held-out success rate."""
        self._say(
            f"held-out at step {step}: success rate {evaluation.success_rate:.3f}"
            f" +- {evaluation.standard_error:.3f}, solved {evaluation.solved_fraction:.3f}"
            f" ({evaluation.num_questions} questions x {evaluation.num_generations},"
            f" {evaluation.completion_length_mean_tokens:.1f} tokens each)",
            style="bold",
        )

    @hookimpl
    def dteframe_step_finished(self, report: StepReport) -> None:
        """Move the bar and print the step's row."""
        row = report.metrics()
        if report.step > 0:
            self._seconds_here += row.get("time/step_seconds", 0.0)
        self._last_row = row
        left = self._left(report)
        if self._run is not None:
            self._bars.update(self._run, completed=report.step, left=f"{left} left" if left else "")
        if report.step == 0:
            return
        is_edge = report.step in (self._first_step + 1, report.max_steps)
        if is_edge or report.step % self.config.every == 0:
            self._print_row(report, row, left)

    @hookimpl
    def dteframe_run_finished(self, summary: RunSummary) -> None:
        """Take the bars away and print what the run came to."""
        self._bars.stop()
        atexit.unregister(self._bars.stop)
        lines = _summary_lines(summary, self._last_row)
        width = max(len(title) for title, _ in lines)
        self._say("")
        self._say(f"{summary.name}: {summary.steps} steps", style="bold")
        for title, text in lines:
            self._say(f"  {title:<{width}}  {text}")

    def _print_row(self, report: StepReport, row: Mapping[str, MetricValue], left: str) -> None:
        if self._num_rows % ROWS_PER_HEADER == 0:
            self._say(_cells(COLUMNS), style="dim")
        self._num_rows += 1
        values = (
            f"{report.step}/{report.max_steps}",
            _number(row.get("answer/reward_mean"), ".3f"),
            _number(row.get("answer/success_rate"), ".3f"),
            _number(row.get("answer/informative_fraction"), ".2f"),
            _number(row.get("forecast/uniform_informative_fraction"), ".2f"),
            _number(row.get("forecast/pearson"), ".2f"),
            _number(row.get("forecast/slope"), ".2f"),
            _number(row.get("update/loss"), ".2e"),
            _number(row.get("answer/completion_length_mean_tokens"), ".1f"),
            _number(row.get("time/step_seconds"), ".2f"),
            left,
        )
        self._say(_cells(values))
        if more := _choice_review_and_replay(row):
            self._say(f"{'':>{WIDTHS[0]}} {more}", style="dim")

    def _left(self, report: StepReport) -> str:
        """Estimate the time left from the mean of the steps since this process began; empty at first."""
        done = report.step - self._first_step
        return _duration(self._seconds_here / done * (report.max_steps - report.step)) if done > 0 else ""

    def _show_bars(self) -> None:
        if self._console.is_terminal and not self._bars.live.is_started:
            self._bars.start()
            # No hook tells of a run that fails: the cursor comes back when the process ends.
            atexit.register(self._bars.stop)

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True)
        self._last_line = time.monotonic()


def _choice_review_and_replay(row: Mapping[str, MetricValue]) -> str:
    """Word what a choice promised, what the selector turned away, how replayed tokens do; or nothing."""
    parts = []
    if "estimate/expected_gain" in row:
        gain = _number(row["estimate/expected_gain"], ".2f")
        num_uniform = _number(row["estimate/coverage_questions"], ".0f")
        parts.append(f"plan: expected gain of choosing {gain}, {num_uniform} questions drawn uniformly")
    if row.get("review/num_asked"):
        counts = [f"{row[f'review/num_{kind}']} {kind}" for kind in _KINDS_OF_GROUPS]
        parts.append(f"review in {row['review/num_rounds']} rounds: {', '.join(counts)}")
    if row.get("replay/num_groups"):
        worth = _number(row.get("update/replayed_effective_sample_fraction"), ".2f")
        distance = _number(row.get("update/replayed_kl_behaviour_nats"), ".3f")
        clipped = _number(row.get("update/clip_fraction"), ".2f")
        share = _number(row.get("replay/guard_share"), ".2f")
        parts.append(
            f"replay of {row['replay/num_groups']} groups: tokens worth {worth}, KL {distance}, "
            f"clipped {clipped}, share {share}"
        )
    return "; ".join(parts)


_KINDS_OF_GROUPS = ("asked", "accepted", "rejected", "surplus", "missing")


def _summary_lines(summary: RunSummary, row: Mapping[str, MetricValue]) -> list[tuple[str, str]]:
    """Give title and text of every line; ``row`` is that of the last step, if there was one."""
    before, after = summary.success_rate_before, summary.success_rate_after
    gain = f" ({after - before:+.3f})" if before is not None and after is not None else ""
    lines = [
        ("held-out success rate", f"{_number(before, '.3f')} before, {_number(after, '.3f')} after{gain}"),
        ("informative groups", _number(summary.informative_fraction, ".1%")),
        *_reference_lines(summary.reference_pearson),
        *_forecast_lines(row),
        ("tokens generated", _counts(summary.tokens_by_purpose)),
        ("completions", _counts(summary.reward_statuses)),
        ("questions left out", _counts(summary.left_out)),
        ("warnings", str(len(summary.warnings))),
        *(("", message) for message in summary.warnings),
    ]
    total = sum(summary.seconds_by_stage.values())
    by_length = sorted(summary.seconds_by_stage.items(), key=lambda item: (-item[1], item[0]))
    lines.append(("seconds", f"{total:.1f} in all"))
    lines += [
        ("", f"{seconds:9.1f}  {seconds / total:6.1%}  {stage}") for stage, seconds in by_length if seconds
    ]
    lines.append(("policy", str(summary.run_folder / "policy")))
    return lines


def _reference_lines(correlation: float | None) -> list[tuple[str, str]]:
    """Say how well references were predicted, where there were any."""
    if correlation is None:
        return []
    return [("estimator correlation", f"{correlation:.2f} with measured success rates of references")]


def _forecast_lines(row: Mapping[str, MetricValue]) -> list[tuple[str, str]]:
    """Say how well the newest forecasts held, and what estimating and selecting took."""
    lines = []
    if "forecast/nll_nats" in row:
        lines.append(
            (
                "newest forecasts",
                f"{row['forecast/num_groups']} groups: r {_number(row.get('forecast/pearson'), '.2f')} "
                f"(at best {_number(row.get('forecast/pearson_ceiling'), '.2f')}), "
                f"slope {_number(row.get('forecast/slope'), '.2f')}"
                f" +- {_number(row.get('forecast/slope_standard_error'), '.2f')}, "
                f"Brier {_number(row['forecast/brier'], '.3f')} "
                f"(at best {_number(row.get('forecast/brier_floor'), '.3f')}), nats a rollout "
                f"{_number(row['forecast/nll_nats'], '.3f')} (a constant "
                f"{_number(row['forecast/constant_nll_nats'], '.3f')})",
            )
        )
    if "forecast/uniform_informative_fraction" in row:
        chosen = _number(row.get("forecast/chosen_informative_fraction"), ".1%")
        uniform = _number(row["forecast/uniform_informative_fraction"], ".1%")
        lines.append(("newest informative", f"{chosen} of chosen, {uniform} of uniformly drawn groups"))
    if row.get("cost/reference_rollouts"):
        lines.append(
            (
                "references",
                f"{row['cost/reference_rollouts']} rollouts, {row['cost/reference_tokens']} tokens, "
                f"{_number(row.get('cost/reference_seconds'), '.1f')} s",
            )
        )
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _number(value: MetricValue | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cells(values: tuple[str, ...]) -> str:
    return " ".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin classes of this module."""
    return [Console]
