"""Draw a comparison's curves: success against seconds and tokens, and what selection did."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dteframe.errors import DTEFrameError
from dteframe.experiments.run_curves import Curve
from dteframe.experiments.time_to_target import trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which people with any colour vision can tell apart; the baseline is black."""
NUM_POINTS = 200
STEPS_OF_A_POINT = 10
"""Steps whose mean is one point of a figure that every step has."""


def write_plots(curves: Sequence[Curve], baseline: str, window: int, folder: Path) -> list[Path]:
    """Write a PNG and an SVG per pair; thin lines are runs, thick ones the mean of an arm's seeds.

    Raises:
        DTEFrameError: matplotlib is not installed, or the folder cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise DTEFrameError(
            "--plots: needs the package matplotlib, which is not installed; "
            "install it with: pip install 'dteframe[plots]'"
        )
    from matplotlib.figure import Figure

    written = []
    for pair in sorted({curve.pair for curve in curves}):
        of_pair = [curve for curve in curves if curve.pair == pair]
        arms = [baseline, *sorted({curve.arm for curve in of_pair} - {baseline})]
        figure = Figure(figsize=(11, 8), layout="constrained")
        panels = figure.subplots(2, 2)
        for number, arm in enumerate(arms):
            of_arm = [curve for curve in of_pair if curve.arm == arm]
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
        for ending in ("png", "svg"):
            path = folder / f"{pair or 'comparison'}.{ending}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=120, metadata={"Date": None} if ending == "svg" else None)
            except OSError as error:
                raise DTEFrameError(f"--plots {path}: cannot be written ({error.strerror})") from error
            written.append(path)
    return written


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


def _draw_series(panel: Axes, series: Sequence[Float[np.ndarray, "steps"]], colour: str) -> None:
    if not series:
        return
    length = min(len(values) for values in series) // STEPS_OF_A_POINT * STEPS_OF_A_POINT
    if length == 0 or all(np.isnan(values).all() for values in series):
        return
    together = np.stack([values[:length] for values in series]).reshape(len(series), -1, STEPS_OF_A_POINT)
    steps = np.arange(together.shape[1]) * STEPS_OF_A_POINT + STEPS_OF_A_POINT / 2
    panel.plot(steps, np.nanmean(together, axis=(0, 2)), color=colour, linewidth=1.5)
