"""Draw a reliability diagram: measured over predicted success rates, a line per recipe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dteframe.errors import DTEFrameError
from dteframe.experiments.evaluate_estimators import Comparison
from dteframe.experiments.figure_files import save_figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's, which people with any colour vision can tell apart."""
DASHES = ("-", "--", ":", "-.")
"""Tell lines of equal colour apart."""
ENDINGS = (".png", ".svg")


def check_diagram(path: Path) -> None:
    """Refuse a file that could not be drawn, before the work is done.

    Raises:
        DTEFrameError: it is neither PNG nor SVG, or matplotlib is not installed.
    """
    if path.suffix not in ENDINGS:
        raise DTEFrameError(f"--diagram {path}: must end in {' or '.join(ENDINGS)}")
    if find_spec("matplotlib") is None:
        raise DTEFrameError(
            f"--diagram {path}: needs the package matplotlib, which is not installed; "
            "install it with: pip install 'dteframe[plots]'"
        )


def draw_reliability(comparison: Comparison, path: Path) -> None:
    """Write the diagram in the form that the file's ending names; the diagonal is calibrated.

    A point stands for the forecasts of a tenth of [0, 1], the larger the more there are.

    Raises:
        DTEFrameError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    height = 5.5 + 0.2 * len(comparison.verdicts)
    figure = Figure(figsize=(6, height), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color="#aaaaaa", linestyle="--", linewidth=1)
    for number, verdict in enumerate(comparison.verdicts):
        bins = verdict.reliability
        most = max(item.num_forecasts for item in bins)
        predicted, measured = [item.predicted for item in bins], [item.measured for item in bins]
        colour = COLOURS[number % len(COLOURS)]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        panel.plot(predicted, measured, dashes, color=colour, linewidth=1.2, label=verdict.recipe)
        sizes = [4 + 36 * item.num_forecasts / most for item in bins]
        panel.scatter(predicted, measured, sizes, color=colour)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set_xlabel("predicted success rate")
    panel.set_ylabel("measured success rate")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    try:
        save_figure(figure, path)
    except OSError as error:
        raise DTEFrameError(
            f"--diagram {path}: cannot be written ({error.strerror}); give another file"
        ) from error
