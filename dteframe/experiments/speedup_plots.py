"""Draw a comparison: success against seconds and tokens, what selection did, and what each arm saved."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dteframe.errors import DTEFrameError
from dteframe.experiments.figure_files import save_figure
from dteframe.experiments.run_curves import Curve, Series
from dteframe.experiments.speedup import ArmComparison, Comparison
from dteframe.experiments.time_to_target import trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which people with any colour vision can tell apart; the baseline is black."""
NUM_POINTS = 200
STEPS_OF_A_POINT = 10
"""Steps whose mean is one point of a figure that every step has."""
SAVINGS = "savings"
"""Name of the figure of all pairs."""
BY_SHARE = "savings_by_share"
"""Name of the figure of what is saved over what there is to save, of three pairs or more."""
MIN_PAIRS_BY_SHARE = 3
LARGEST_COST = 1.0
"""Of the figure by share: intervals go beyond it where they must, the axis does not."""
UNITS_DRAWN = (("seconds", "#56b4e9", 0.12), ("tokens", "#e69f00", -0.12))
"""Whose savings are drawn, in which colour, how far above the arm's row."""


def write_plots(curves: Sequence[Curve], comparison: Comparison, folder: Path) -> list[Path]:
    """Write a PNG and an SVG per pair, and one of each of what the arms saved.

    In a pair's figure thin lines are runs, thick ones the mean of an arm's seeds. With three pairs or more
    another figure has the time saved over the baseline's share of uninformative groups.

    Raises:
        DTEFrameError: matplotlib is not installed, or the folder cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise DTEFrameError(
            "--plots: needs the package matplotlib, which is not installed; "
            "install it with: pip install 'dteframe[plots]'"
        )
    pairs = sorted({curve.pair for curve in curves})
    for name in (SAVINGS, BY_SHARE):
        if name in pairs:
            raise DTEFrameError(f"--plots: a pair is called {name!r}, as a figure of all; rename the pair")
    written = []
    for pair in pairs:
        figure = _draw_curves([curve for curve in curves if curve.pair == pair], comparison, pair)
        written += _save(figure, folder / (pair or "comparison"))
    written += _save(_draw_savings(comparison), folder / SAVINGS)
    if len(comparison.testbeds) >= MIN_PAIRS_BY_SHARE:
        written += _save(_draw_savings_by_share(comparison), folder / BY_SHARE)
    return written


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for one in paths:
        try:
            one.parent.mkdir(parents=True, exist_ok=True)
            save_figure(figure, one)
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); name a folder that can"
            raise DTEFrameError(f"--plots {one}: {reason}") from error
    return paths


def _draw_curves(curves: Sequence[Curve], comparison: Comparison, pair: str) -> Figure:
    from matplotlib.figure import Figure

    baseline, window = comparison.rules.baseline, comparison.rules.trailing_evaluations
    arms = [baseline, *sorted({curve.arm for curve in curves} - {baseline})]
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for number, arm in enumerate(arms):
        of_arm = [curve for curve in curves if curve.arm == arm]
        colour = COLOURS[number % len(COLOURS)]
        for panel, unit in ((panels[0, 0], "seconds"), (panels[0, 1], "tokens")):
            _draw_success(panel, of_arm, unit, window, colour, arm)
        _draw_series(panels[1, 0], [curve.informative_fractions for curve in of_arm], colour)
        _draw_series(panels[1, 1], [curve.correlations for curve in of_arm], colour)
    labels = (
        (panels[0, 0], "training seconds", f"success rate, mean of {window}"),
        (panels[0, 1], "tokens generated, references included", f"success rate, mean of {window}"),
        (panels[1, 0], "step", "share of informative groups"),
        (panels[1, 1], "step", "correlation of predicted and measured"),
    )
    for panel, across, up in labels:
        panel.set_xlabel(across)
        panel.set_ylabel(up)
    panels[0, 0].legend(frameon=False)
    figure.suptitle(pair)
    return figure


def _draw_savings(comparison: Comparison) -> Figure:
    """Draw a panel per pair and family of arms: those whose names begin alike up to the first ``_``."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    arms = list(dict.fromkeys(arm.arm for arm in comparison.arms))
    beginnings = [arm.split("_")[0] for arm in arms]
    families: dict[str, list[str]] = {}
    for arm, beginning in zip(arms, beginnings, strict=True):
        families.setdefault(beginning if beginnings.count(beginning) > 1 else "", []).append(arm)
    pairs = list(dict.fromkeys(arm.pair for arm in comparison.arms))
    figure = Figure(
        figsize=(1.5 + 3.5 * len(pairs), 1.5 + 0.5 * len(families) + 0.3 * len(arms)), layout="constrained"
    )
    panels = figure.subplots(
        len(families),
        len(pairs),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[len(members) + 0.5 for members in families.values()],
    )
    for row, members in enumerate(families.values()):
        for column, pair in enumerate(pairs):
            found = {arm.arm: arm for arm in comparison.arms if arm.pair == pair}
            _draw_savings_of(panels[row, column], [(name, found.get(name)) for name in reversed(members)])
    for column, pair in enumerate(pairs):
        panels[0, column].set_title(pair)
        panels[-1, column].set_xlabel(f"% of {comparison.rules.baseline}'s cost saved")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=unit) for unit, colour, _ in UNITS_DRAWN
    ]
    hollow = Line2D(
        [],
        [],
        marker="o",
        linestyle="",
        color="gray",
        markerfacecolor="white",
        label="some runs never arrive",
    )
    figure.legend(handles=[*handles, hollow], loc="outside upper right", ncols=3, frameon=False)
    return figure


def _draw_savings_of(panel: Axes, arms: Sequence[tuple[str, ArmComparison | None]]) -> None:
    """Draw each arm's savings, from below; hollow where runs that never arrive count at their whole cost."""
    for row, (_, arm) in enumerate(arms):
        if arm is None:
            panel.annotate("no run", (0, row), color="gray", fontsize="small", va="center", ha="center")
            continue
        for unit, colour, y_offset in UNITS_DRAWN:
            saving = arm.savings[unit]
            panel.errorbar(
                100 * saving.mean,
                row + y_offset,
                xerr=saving.percent_around_mean(),
                fmt="o",
                markersize=4,
                color=colour,
                markerfacecolor="white" if arm.num_censored else colour,
            )
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(arms)), [name for name, _ in arms])
    panel.set_ylim(-0.6, len(arms) - 0.4)


def _draw_savings_by_share(comparison: Comparison) -> Figure:
    """Draw the time that arms save, a point per pair, over the share of groups that the baseline wastes."""
    from matplotlib.figure import Figure

    baseline = comparison.rules.baseline
    shares = {testbed.pair: 100 * testbed.uninformative for testbed in comparison.testbeds}
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(sorted({arm.arm for arm in comparison.arms})):
        points = sorted((arm for arm in comparison.arms if arm.arm == name), key=lambda one: shares[one.pair])
        colour = COLOURS[(number + 1) % len(COLOURS)]
        for place, point in enumerate(points):
            saving = point.savings["seconds"]
            panel.errorbar(
                shares[point.pair],
                100 * saving.mean,
                yerr=saving.percent_around_mean(),
                fmt="o",
                color=colour,
                markerfacecolor="white" if point.num_censored else colour,
                elinewidth=0.8,
                label=None if place else name,
            )
    for pair, share in shares.items():
        panel.annotate(
            pair,
            (share, 0.01),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize="x-small",
            ha="right",
        )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_ylim(bottom=max(-100 * LARGEST_COST, panel.get_ylim()[0]), top=100)
    panel.set_xlabel(f"% of {baseline}'s groups without a gradient, mean of its steps")
    panel.set_ylabel(f"% of {baseline}'s time saved; hollow: some runs never arrive")
    panel.legend(frameon=False)
    return figure


def _draw_success(
    panel: Axes, curves: Sequence[Curve], unit: str, window: int, colour: str, arm: str
) -> None:
    means = [trailing_mean(curve.success_rates, window) for curve in curves]
    costs = [curve.costs[unit] for curve in curves]
    for mean, cost in zip(means, costs, strict=True):
        panel.plot(cost, mean, color=colour, linewidth=0.6, alpha=0.4)
    if curves:
        grid = np.linspace(0, min(cost[-1] for cost in costs), NUM_POINTS)
        read = [np.interp(grid, cost, mean) for cost, mean in zip(costs, means, strict=True)]
        panel.plot(grid, np.mean(read, axis=0), color=colour, linewidth=2, label=arm)


def _draw_series(panel: Axes, series: Sequence[Series], colour: str) -> None:
    """Draw the mean over runs, ten steps a point, as far as every run has come."""
    if not series or not all(len(one.steps) for one in series):
        return
    last_bin = min(int(one.steps[-1] - 1) // STEPS_OF_A_POINT for one in series)
    bins = np.concatenate([(one.steps.astype(int) - 1) // STEPS_OF_A_POINT for one in series])
    values = np.concatenate([one.values for one in series])
    drawn = [place for place in range(last_bin + 1) if (bins == place).any()]
    panel.plot(
        [(place + 0.5) * STEPS_OF_A_POINT for place in drawn],
        [values[bins == place].mean() for place in drawn],
        color=colour,
        linewidth=1.5,
    )
