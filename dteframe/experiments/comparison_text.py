"""A comparison of estimators as a table for people, and as a reliability diagram."""

from __future__ import annotations

from dteframe.experiments.evaluate_estimators import Comparison, Verdict
from dteframe.experiments.scores import Score, Scores

COLUMNS = (
    "recipe", "questions", "pearson", "spearman", "brier", "nll", "slope", "informative", "spent", "s/round"
)  # fmt: skip  # one line says it
SIZE, MARGIN = 420, 60
"""Side of the diagram's square and the room around it, in pixels."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's, which people with any colour vision can tell apart."""


def comparison_text(comparison: Comparison) -> str:
    """Lay the verdicts out as a table: a block of three lines each, with the ceilings in brackets."""
    uniform, best = comparison.uniform_informative_fraction, comparison.best_informative_fraction
    rows: list[tuple[str, ...]] = [COLUMNS]
    for verdict in comparison.verdicts:
        for kind, scores in (("all", verdict.everything), ("seen", verdict.seen), ("unseen", verdict.unseen)):
            if scores is not None:
                rows.append(_row(verdict, kind, scores, uniform))
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    head = (
        f"{comparison.trace}: {comparison.num_questions} questions, {comparison.num_rounds} rounds of "
        f"{comparison.num_chosen} chosen, {comparison.num_seeds} seeds\n"
        f"informative groups: {uniform:.3f} of all (uniform choice), {best:.3f} of the best "
        f"{comparison.num_chosen}\n"
        "score +- half of the 95 % interval (what a perfect estimator would score)\n"
    )
    return head + "\n" + "\n".join(lines)


def reliability_svg(comparison: Comparison) -> str:
    """Draw measured over predicted success rates, one line per recipe; the diagonal is calibrated."""
    whole = SIZE + 2 * MARGIN
    legend = 18 * len(comparison.verdicts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {whole + legend}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{whole}" height="{whole + legend}" fill="white"/>',
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#444"/>',
        f'<line {_ends((0.0, 0.0), (1.0, 1.0))} stroke="#aaa" stroke-dasharray="4 4"/>',
        f'<text x="{whole / 2}" y="{MARGIN + SIZE + 40}" text-anchor="middle">predicted success rate</text>',
        f'<text transform="translate(18 {whole / 2}) rotate(-90)" text-anchor="middle">'
        "measured success rate</text>",
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _place(tick, tick)
        parts.append(f'<text x="{x:.1f}" y="{MARGIN + SIZE + 18}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, verdict in enumerate(comparison.verdicts):
        colour = COLOURS[number % len(COLOURS)]
        points = [_place(item.predicted, item.measured) for item in verdict.reliability]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = whole + 18 * number
        parts.append(f'<rect x="{MARGIN}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{MARGIN + 16}" y="{y}">{_escaped(verdict.recipe)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(verdict: Verdict, kind: str, scores: Scores, uniform: float) -> tuple[str, ...]:
    ceiling = scores.ceiling
    is_first = kind == "all"
    share = verdict.informative_fraction
    return (
        verdict.recipe if is_first else "",
        kind,
        _cell(scores.pearson, 3, None if ceiling is None else ceiling.pearson),
        _cell(scores.spearman, 3, None),
        _cell(scores.brier, 4, None if ceiling is None else ceiling.brier),
        _cell(scores.nll_nats, 4, None if ceiling is None else ceiling.nll_nats),
        _cell(scores.slope, 2, None),
        f"{_cell(share, 3, None)} = {share.value / uniform:.2f}x" if is_first and share and uniform else "",
        f"{verdict.reference_rollouts:.0f}" if is_first else "",
        f"{verdict.seconds_per_round:.3f}" if is_first else "",
    )


def _cell(score: Score | None, digits: int, ceiling: float | None) -> str:
    if score is None:
        return "-"
    half = (score.high - score.low) / 2
    known = "" if ceiling is None else f" ({ceiling:.{digits}f})"
    return f"{score.value:.{digits}f} +- {half:.{digits}f}{known}"


def _place(predicted: float, measured: float) -> tuple[float, float]:
    return MARGIN + predicted * SIZE, MARGIN + (1 - measured) * SIZE


def _ends(*points: tuple[float, float]) -> str:
    (first_x, first_y), (second_x, second_y) = (_place(*point) for point in points)
    return f'x1="{first_x:.1f}" y1="{first_y:.1f}" x2="{second_x:.1f}" y2="{second_y:.1f}"'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
