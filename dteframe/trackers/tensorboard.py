"""Write scalars, sample completions and histograms of success rates for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

import numpy as np
from pydantic import Field

from dteframe.contracts import Component, Context, Tracker, TrackerConfig
from dteframe.hookspecs import hookimpl
from dteframe.records import Group
from dteframe.reports import GroupsReport, PlanReport, RunReport, RunSummary, StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTOGRAM_EDGES = np.linspace(0.0, 1.0, 17)
"""Sixteen bins of success rates: a rate of eight generations has a bin of its own."""


class TensorBoardConfig(TrackerConfig):
    """Options of ``tensorboard``."""

    type: Literal["tensorboard"] = "tensorboard"
    num_sample_completions: int = Field(default=4, ge=0)
    """Completions shown as text at each step and at each evaluation, one per question; 0 is none."""
    histograms: bool = True
    """Show how the predicted success rates of a plan and the measured ones of a step are spread."""


@final
class TensorBoard(Tracker):
    """Curves, sample completions and success-rate histograms in the run's ``tensorboard`` folder."""

    config: TensorBoardConfig

    def __init__(self, config: TensorBoardConfig, context: Context) -> None:
        """Open nothing yet: the writer needs to know at which step the run starts."""
        super().__init__(config, context)
        self._writer: SummaryWriter | None = None

    @hookimpl
    def dteframe_run_started(self, run: RunReport) -> None:
        """Open the event file; points of a stopped run that are computed again vanish from the curves."""
        from torch.utils.tensorboard import SummaryWriter

        first_new_step = run.first_step + 1 if run.first_step > 0 else 0
        folder = str(self.context.run_folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=first_new_step)

    @hookimpl
    def dteframe_plan_made(self, plan: PlanReport) -> None:
        """Show the predicted success rates of the chosen questions."""
        self._add_histogram("histogram/predicted_success_rate", plan.estimate.mean, plan.step)

    @hookimpl
    def dteframe_groups_scored(self, groups: GroupsReport) -> None:
        """Show measured success rates of fresh groups, and a completion of the first few questions."""
        if groups.is_replayed:
            return
        fresh = [group for group in groups.groups if group.purpose == "train"]
        evaluated = [group for group in groups.groups if group.purpose == "evaluation"]
        rates = np.array([group.success_rate for group in fresh])
        self._add_histogram("histogram/measured_success_rate", rates, groups.step)
        self._add_samples("samples/train", fresh, groups)
        self._add_samples("samples/evaluation", evaluated, groups)

    @hookimpl
    def dteframe_step_finished(self, report: StepReport) -> None:
        """Add the step's metrics; TensorBoard groups them by what stands before the slash."""
        if self._writer is None:
            return
        for name, value in report.metrics().items():
            if name != "step":
                self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    @hookimpl
    def dteframe_run_finished(self, summary: RunSummary) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add_histogram(self, tag: str, rates: np.ndarray, step: int) -> None:
        if self._writer is not None and self.config.histograms and len(rates) > 0:
            self._writer.add_histogram(tag, rates, step, bins=HISTOGRAM_EDGES)

    def _add_samples(self, tag: str, shown: list[Group], groups: GroupsReport) -> None:
        texts = [_as_markdown(group, groups) for group in shown[: self.config.num_sample_completions]]
        if self._writer is not None and texts:
            self._writer.add_text(tag, "\n\n---\n\n".join(texts), groups.step)


def _as_markdown(group: Group, groups: GroupsReport) -> str:
    """Show a question and its first completion; indented blocks, for completions may hold any fence."""
    blocks = {
        f"question {group.question_id}, success rate {group.success_rate:.3g}": groups.prompts[
            group.question_id
        ],
        f"completion, reward {group.rewards[0]:.3g}": group.completions[0].text,
        "answer": groups.answers[group.question_id],
    }
    return "\n\n".join(f"{title}\n\n{_indent(text)}" for title, text in blocks.items())


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin classes of this module."""
    return [TensorBoard]
