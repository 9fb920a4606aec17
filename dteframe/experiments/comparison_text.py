"""A comparison of estimators as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from dteframe.experiments.evaluate_estimators import Comparison, Verdict
from dteframe.experiments.scores import Score, Scores

COLUMNS = (
    "recipe", "questions", "pearson", "spearman", "brier", "nll", "slope", "informative", "spent",
    "s/predict", "s/choose",
)  # fmt: skip  # two lines say it
DIFFERENCE_COLUMNS = ("recipe", "questions", "pearson", "brier", "nll", "informative")


def comparison_text(comparison: Comparison) -> str:
    """Lay the verdicts out as a table: a block of three lines each, with the ceilings in brackets."""
    uniform, best = comparison.uniform_informative_fraction, comparison.best_informative_fraction
    rows: list[tuple[str, ...]] = [COLUMNS]
    for verdict in comparison.verdicts:
        for kind, scores in (("all", verdict.everything), ("seen", verdict.seen), ("unseen", verdict.unseen)):
            if scores is not None:
                rows.append(_row(verdict, kind, scores, uniform))
    head = (
        f"{comparison.trace}: {comparison.num_questions} questions, {comparison.num_rounds} rounds of "
        f"{comparison.num_chosen} chosen, {comparison.num_seeds} seeds\n"
        f"{_what_is_missing(comparison)}"
        f"informative groups: {uniform:.3f} of all (uniform choice), {best:.3f} of the best "
        f"{comparison.num_chosen}\n"
        "score +- half of the 95 % interval (what a perfect estimator would score)\n"
    )
    return head + "\n" + _columns(rows)


def differences_text(comparison: Comparison) -> str:
    """Lay out how all recipes did less the one that they are compared with; stars: beyond chance."""
    rows: list[tuple[str, ...]] = [DIFFERENCE_COLUMNS]
    for verdict in comparison.verdicts:
        gain = verdict.less_baseline
        if gain is None:
            continue
        share = gain.informative_fraction
        for kind, found in (("all", gain.everything), ("seen", gain.seen), ("unseen", gain.unseen)):
            if found is not None:
                cells = [
                    _difference(found.pearson, 3),
                    _difference(found.brier, 4),
                    _difference(found.nll_nats, 4),
                ]
                is_first = kind == "all"
                rows.append(
                    (
                        verdict.recipe if is_first else "",
                        kind,
                        *cells,
                        _difference(share, 3) if is_first else "",
                    )
                )
    return (
        f"less {comparison.against}, on the same questions in the same rounds; [95 % interval], * where it "
        f"leaves 0 out\n\n{_columns(rows)}"
    )


def _row(verdict: Verdict, kind: str, scores: Scores, uniform: float) -> tuple[str, ...]:
    ceiling = scores.ceiling
    is_first = kind == "all"
    share = verdict.informative_fraction
    return (
        verdict.recipe if is_first else "",
        kind,
        cell(scores.pearson, 3, None if ceiling is None else ceiling.pearson),
        cell(scores.spearman, 3, None),
        cell(scores.brier, 4, None if ceiling is None else ceiling.brier),
        cell(scores.nll_nats, 4, None if ceiling is None else ceiling.nll_nats),
        cell(scores.slope, 2, None),
        f"{cell(share, 3, None)} = {share.value / uniform:.2f}x" if is_first and share and uniform else "",
        f"{verdict.reference_rollouts:.0f}" if is_first else "",
        f"{verdict.predicting_seconds_per_round:.3f}" if is_first else "",
        f"{verdict.choosing_seconds_per_round:.4f}" if is_first else "",
    )


def _what_is_missing(comparison: Comparison) -> str:
    """Say what the trace lacks, and what of it was not used; a line each, or nothing."""
    whole = comparison.num_rounds * comparison.num_questions
    lines = []
    if comparison.num_groups < whole:
        lines.append(
            f"rounds are stretches of time: {comparison.num_groups} of {whole} questions x rounds were "
            "measured; only these are predicted, chosen (half of a round's at most) and revealed"
        )
    if comparison.left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in comparison.left_out.items())
        lines.append(f"groups left out: {counts}")
    for verdict in comparison.verdicts:
        if verdict.replaced_references or verdict.missing_references:
            lines.append(
                f"{verdict.recipe}: {verdict.replaced_references:.0f} references replaced by measured ones, "
                f"{verdict.missing_references:.0f} without any"
            )
    return "".join(f"{line}\n" for line in lines)


def cell(score: Score | None, digits: int, ceiling: float | None = None) -> str:
    """Write a score with half of its interval, and what a perfect estimator would have in brackets."""
    if score is None:
        return "-"
    half = (score.high - score.low) / 2
    known = "" if ceiling is None else f" ({ceiling:.{digits}f})"
    return f"{score.value:.{digits}f} +- {half:.{digits}f}{known}"


def _difference(score: Score | None, digits: int) -> str:
    if score is None:
        return "-"
    star = "" if score.low <= 0 <= score.high else " *"
    return f"{score.value:+.{digits}f} [{score.low:+.{digits}f}, {score.high:+.{digits}f}]{star}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
