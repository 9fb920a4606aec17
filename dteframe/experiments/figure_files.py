"""Write a figure to a file whose bytes depend on what is drawn alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, as the path ends; the same figure gives the same file.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    # Without a salt of its own matplotlib names an SVG's parts at random.
    with rc_context({"svg.hashsalt": "dteframe"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
