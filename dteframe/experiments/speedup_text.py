"""A comparison of arms as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from dteframe.experiments.speedup import ArmComparison, Comparison, Saving, Testbed
from dteframe.experiments.time_to_target import Interval

ARM_COLUMNS = tuple(
    "pair,arm,seeds,time saved,,CPU time,tokens,rollouts,steps,paper's smoothing,never,at equal time,"
    "informative".split(",")
)
NOT_COUNTED = ("load", "evaluate", "checkpoint")
"""Stages that time to target leaves out; shown apart."""


def speedup_text(comparison: Comparison) -> str:
    """Say what was compared and how, whether the baselines say something, and what each arm saves."""
    rules = comparison.rules
    head = (
        f"target: what {rules.baseline} reaches after {rules.target_budget_fraction:.0%} of its steps, "
        f"seed by seed; success rates are means of {rules.trailing_evaluations} evaluations\n"
        f"saved against {rules.baseline}: mean of the seeds' log ratios [95 % interval: bootstrap, "
        "Student's below five seeds]\n"
        "<=: at most, since runs that never reach the target count at all that they paid\n"
        "time leaves out loading, evaluation and checkpoints"
    )
    parts = [
        head,
        _testbed_table(comparison.testbeds),
        _arm_table(comparison.arms),
        _purposes(comparison.arms),
    ]
    parts += [f"left out: {run}" for run in comparison.left_out]
    return "\n\n".join(parts)


def _testbed_table(testbeds: Sequence[Testbed]) -> str:
    rows = [("pair", "seeds", "success", "target", "end", "noise", "uninformative: begin", "all", "")]
    for bed in testbeds:
        warning = f"{bed.num_without_gain} seeds gain less than 2 x noise" if bed.num_without_gain else ""
        rows.append(
            (
                bed.pair or "-",
                str(len(bed.seeds)),
                f"{bed.first_success_rate:.3f}",
                f"{bed.target:.3f}",
                f"{bed.last_success_rate:.3f}",
                f"{bed.evaluation_standard_error:.3f}",
                f"{bed.uninformative_first:.0%}",
                f"{bed.uninformative:.0%}",
                warning,
            )
        )
    return table(rows)


def _arm_table(arms: Sequence[ArmComparison]) -> str:
    rows = [ARM_COLUMNS]
    for arm in arms:
        rows.append(
            (
                arm.pair or "-",
                arm.arm,
                str(len(arm.seeds)),
                _bound(arm) + _saving_text(arm.savings["seconds"]),
                arm.verdict,
                _bound(arm) + _saving_text(arm.savings["cpu_seconds"]),
                *(f"{_bound(arm)}{arm.savings[unit].mean:.0%}" for unit in ("tokens", "rollouts", "steps")),
                _saving_text(arm.paper_saving),
                str(arm.num_censored),
                _gain_text(arm.gain_at_equal_time),
                f"{arm.informative_fraction:.0%}",
            )
        )
    return table(rows)


def _purposes(arms: Sequence[ArmComparison]) -> str:
    stages = sorted({stage for arm in arms for stage in arm.seconds_by_purpose})
    counted = [stage for stage in stages if stage not in NOT_COUNTED]
    apart = [stage for stage in stages if stage in NOT_COUNTED]
    rows = [
        (
            "pair",
            "arm",
            "s to target (median)",
            "(baseline)",
            *counted,
            "| apart:",
            *apart,
            "reference tokens",
        )
    ]
    for arm in arms:
        rows.append(
            (
                arm.pair or "-",
                arm.arm,
                f"{arm.seconds_to_target:.1f}",
                f"{arm.baseline_seconds_to_target:.1f}",
                *(
                    f"{arm.seconds_by_purpose[stage]:.1f}" if stage in arm.seconds_by_purpose else "-"
                    for stage in counted
                ),
                "|",
                *(
                    f"{arm.seconds_by_purpose[stage]:.1f}" if stage in arm.seconds_by_purpose else "-"
                    for stage in apart
                ),
                f"{arm.reference_token_fraction:.0%}",
            )
        )
    return table(rows)


def _bound(arm: ArmComparison) -> str:
    """Say that a saving is an upper bound where runs never arrive: they would have paid more."""
    return "<= " if arm.num_censored else ""


def _saving_text(saving: Saving) -> str:
    if saving.low is None or saving.high is None:
        return f"{saving.mean:.0%}"
    return f"{saving.mean:.0%} [{saving.low:.0%}, {saving.high:.0%}]"


def _gain_text(gain: Interval) -> str:
    if gain.low is None or gain.high is None:
        return f"{gain.mean:+.3f}"
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Lay rows out in columns."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
