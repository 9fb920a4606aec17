"""Write metrics, rollouts, selections and the trace as JSON lines: the run's record that all else reads.

A number that is not finite is written as null, which nothing else is; the first of each name is warned of.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from typing import Any, Literal, final

import numpy as np
from pydantic import Field

from dteframe.contracts import Component, Context, Tracker, TrackerConfig
from dteframe.errors import ResumeError
from dteframe.hookspecs import hookimpl
from dteframe.records import FAILURES, Group, JsonValue, State
from dteframe.reports import GroupsReport, PlanReport, RunSummary, StepReport
from dteframe.traces import read_trace, write_trace

FILE_NAMES = ("metrics.jsonl", "rollouts.jsonl", "selections.jsonl", "trace.jsonl", "reward_failures.jsonl")


class JsonlConfig(TrackerConfig):
    """Options of ``jsonl``."""

    type: Literal["jsonl"] = "jsonl"
    rollouts: Literal["all", "fresh", "none"] = "all"
    """Groups written to rollouts.jsonl: all; fresh training groups alone, without reference, evaluation and
    replayed ones; or none."""
    rollouts_every: int = Field(default=1, ge=1)
    """Write the rollouts of every n-th step, step 0 included."""


@final
class Jsonl(Tracker):
    """Metrics, rollouts, selections and the trace as JSON lines; always on."""

    config: JsonlConfig

    def __init__(self, config: JsonlConfig, context: Context) -> None:
        """Open nothing yet: the files may be cut first."""
        super().__init__(config, context)
        self._files: dict[str, FileIO] = {}
        self._warned_of: set[str] = set()

    @hookimpl
    def dteframe_plan_made(self, plan: PlanReport) -> None:
        """Write one row per plan to selections.jsonl."""
        where = {name: index for index, name in enumerate(plan.estimate.question_ids)}
        order = [where[name] for name in plan.question_ids]
        row = {
            "step": plan.step,
            "question_ids": list(plan.question_ids),
            "predicted_success_rates": plan.estimate.mean[order].tolist(),
            "evidence_rollouts": plan.estimate.evidence[order].tolist(),
            "reused_reference_ids": list(plan.reused_reference_ids),
            **plan.figures.metrics(),
        }
        self._write("selections.jsonl", row)

    @hookimpl
    def dteframe_groups_scored(self, groups: GroupsReport) -> None:
        """Write one row per group to rollouts.jsonl; of a replayed group only which one it is.

        Whatever the options, trace.jsonl gets a short row of every group that was generated, and
        reward_failures.jsonl one of every completion that could not be scored.
        """
        if not groups.is_replayed:
            for group in groups.groups:
                self._write("trace.jsonl", _trace_row(groups, group))
                for index, status in enumerate(group.reward_statuses):
                    if status in FAILURES:
                        self._write("reward_failures.jsonl", _failure(groups, group, index))
        if self.config.rollouts == "none" or groups.step % self.config.rollouts_every:
            return
        for group in groups.groups:
            if groups.is_replayed:
                if self.config.rollouts == "all":
                    self._write("rollouts.jsonl", _group_name(groups, group))
            elif self.config.rollouts == "all" or group.purpose == "train":
                row = {
                    **_group_name(groups, group),
                    "prompt": groups.prompts[group.question_id],
                    "answer": groups.answers[group.question_id],
                    "completions": [_completion(group, index) for index in range(group.trials)],
                }
                self._write("rollouts.jsonl", row)

    @hookimpl
    def dteframe_step_finished(self, report: StepReport) -> None:
        """Write the row of metrics.jsonl."""
        self._write("metrics.jsonl", report.metrics())

    @hookimpl
    def dteframe_run_finished(self, summary: RunSummary) -> None:
        """Close the files, and write the trace as parquet."""
        self._close()
        if self._size("trace.jsonl"):
            trace = read_trace(self.context.run_folder / "trace.jsonl")
            write_trace(trace, self.context.run_folder / "trace.parquet")

    def state_dict(self) -> State:
        """Bring the files to the disk and give their lengths in bytes."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {"bytes": {name: self._size(name) for name in FILE_NAMES}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the files back to the checkpoint's lengths, so that no step is there twice.

        Raises:
            ResumeError: a file is shorter than it was at the checkpoint, and so has lost rows.
        """
        self._close()
        for name, length in state["bytes"].items():
            size = self._size(name)
            path = self.context.run_folder / name
            if size < length:
                raise ResumeError(
                    f"{path}: has {size} bytes but had {length} at the checkpoint: rows were lost; "
                    "restore the file or start a new run"
                )
            if size > length:
                os.truncate(path, length)

    def _size(self, name: str) -> int:
        path = self.context.run_folder / name
        return path.stat().st_size if path.exists() else 0

    def _write(self, name: str, row: Mapping[str, JsonValue]) -> None:
        if name not in self._files:
            # Kept open from one hook to the next; closed by dteframe_run_finished. Without a buffer, rows are
            # there when a run dies, and a full disk is noticed where the row is written.
            self._files[name] = (self.context.run_folder / name).open("ab", buffering=0)
        not_finite: list[str] = []
        line = json.dumps(_finite(row, "", not_finite), ensure_ascii=False, allow_nan=False)
        rest = line.encode("utf-8", "backslashreplace") + b"\n"
        while rest:  # A disk that is nearly full takes a part.
            rest = rest[self._files[name].write(rest) :]
        for key in dict.fromkeys(not_finite):
            if (where := f"{name}: {key}") not in self._warned_of:
                self._warned_of.add(where)
                step = row["step"]
                self.context.warn(
                    f"{where} is not finite at step {step}; it is written as null, here and later"
                )

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _group_name(groups: GroupsReport, group: Group) -> dict[str, JsonValue]:
    """Say which group it is and how it did."""
    return {
        "step": groups.step,
        "purpose": group.purpose,
        "is_replayed": groups.is_replayed,
        "question_id": group.question_id,
        "policy_version": group.policy_version,
        "successes": group.successes,
        "trials": group.trials,
        **({"unused": groups.unused[group.question_id]} if group.question_id in groups.unused else {}),
    }


def _trace_row(groups: GroupsReport, group: Group) -> dict[str, JsonValue]:
    """Give what estimators are judged on (``dteframe.traces``)."""
    return {
        "question_id": group.question_id,
        "text": groups.texts[group.question_id],
        "policy_version": group.policy_version,
        "purpose": group.purpose,
        "successes": group.successes,
        "trials": group.trials,
    }


def _failure(groups: GroupsReport, group: Group, index: int) -> dict[str, JsonValue]:
    """Give a completion that could not be scored, and why."""
    return {
        "step": groups.step,
        "purpose": group.purpose,
        "question_id": group.question_id,
        "prompt": groups.prompts[group.question_id],
        "answer": groups.answers[group.question_id],
        "text": group.completions[index].text,
        **_how_scored(group, index),
    }


def _how_scored(group: Group, index: int) -> dict[str, JsonValue]:
    """Say what became of scoring a completion, unless there is nothing to say."""
    if not group.reward_statuses or group.reward_statuses[index] == "scored":
        return {}
    error = group.reward_errors[index] if group.reward_errors else ""
    return {"reward_status": group.reward_statuses[index], **({"reward_error": error} if error else {})}


def _completion(group: Group, index: int) -> dict[str, JsonValue]:
    """Give one completion with everything known of it but its tokens."""
    completion = group.completions[index]
    return {
        **_how_scored(group, index),
        "text": completion.text,
        "reward": float(group.rewards[index]),
        "reward_parts": {name: float(scores[index]) for name, scores in group.reward_parts.items()},
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _finite(value: JsonValue, key: str, not_finite: list[str]) -> JsonValue:
    """Copy a JSON value with null for every number that is not finite, and note their keys."""
    if isinstance(value, Mapping):
        return {
            name: _finite(item, f"{key}.{name}" if key else name, not_finite) for name, item in value.items()
        }
    if isinstance(value, list):
        return [_finite(item, key, not_finite) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        not_finite.append(key)
        return None
    return value


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin classes of this module."""
    return [Jsonl]
