"""Fit an adapter to recorded success rates, and judge it on questions that it never saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import TypeAdapter, ValidationError

from dteframe.contracts import Context
from dteframe.errors import DataError
from dteframe.estimators.adapter import AdapterShape, save_adapter
from dteframe.estimators.adapter_training import AdapterTraining, FittedAdapter, SolveCounts, fit_adapter
from dteframe.estimators.embedding_options import EmbeddingsConfig, NgramEmbeddings, PolicyEmbeddings
from dteframe.estimators.embeddings import Embedder, embed, embedder_of
from dteframe.experiments.comparison_text import cell
from dteframe.experiments.contenders import JUDGED, MIN_JUDGED, STOPPING, TRAINED_ON, Split, judge
from dteframe.experiments.recorded_rates import RecordedRates, read_recorded_rates, without_questions
from dteframe.experiments.scores import Scores, scores_of
from dteframe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How an adapter is fitted and judged."""

    hidden_width: int = 64
    """Numbers in an adapter's output and hidden layers; 896 in the paper."""
    num_layers: int = 1
    """Linear layers of each adapter."""
    dropout: float = 0.1
    held_out_fraction: float = 0.2
    """Share of the groups of near duplicates that is not trained on: half decides when training ends and
    gives the references, half is judged."""
    training: AdapterTraining = AdapterTraining()


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit is from, and how it did on questions that were held out."""

    embedder: str
    width: int
    files: tuple[tuple[str, str, int], ...]
    num_policies: int
    num_questions: int
    num_trained_on: int
    num_stopped_by: int
    num_judged: int
    settings: FitSettings
    best_epoch: int
    penalty: float
    gains: tuple[float, ...]
    scores: dict[str, Scores]
    """By contender, over all policies."""


@dataclass(frozen=True, slots=True)
class Features:
    """Embeddings of the questions, as an adapter gets them."""

    embedder: Embedder
    matrix: Float[np.ndarray, "questions width"]
    widths: tuple[int, ...]
    """Columns of each part."""


def fit_settings(seed: int, held_out_fraction: float) -> FitSettings:
    """Give the settings that a command line leaves open."""
    return FitSettings(held_out_fraction=held_out_fraction, training=AdapterTraining(seed=seed))


def fit_tables(
    tables: Sequence[Path],
    without: Sequence[Path],
    embeddings: EmbeddingsConfig,
    settings: FitSettings,
    context: Context,
    out: Path,
) -> FitReport:
    """Fit an adapter to success rates, less the questions of some tables, judge it, and write it to a file.

    Raises:
        DataError: no table is given, or one cannot be used; names it.
    """
    if not tables:
        raise DataError("no table is given; name a trace, a run folder or a published table of success rates")
    check_writable(out)
    recorded = read_recorded_rates(tables, context.warn)
    if without:
        recorded = without_questions(recorded, without, context.warn)
    features = features_of(recorded.texts, embeddings, context)
    fitted, report = fit_estimator(recorded, features, settings, context.progress)
    save_adapter(fitted.adapter, out, asdict(report))
    return report


def embeddings_of(recipe: Recipe | None) -> EmbeddingsConfig:
    """Find which embeddings the recipe's estimator reads; hashed n-grams without a recipe.

    Raises:
        DataError: its estimator reads none, or those of the policy, which no file can be fitted to.
    """
    if recipe is None:
        return NgramEmbeddings()
    options = recipe.estimator.model_dump()
    if "adapter" not in options:
        raise DataError(
            f"estimator.type: {recipe.estimator.type!r} takes no adapter; name a recipe with 'attention' or "
            "'history_and_attention'"
        )
    try:
        config: EmbeddingsConfig = TypeAdapter(EmbeddingsConfig).validate_python(options["embeddings"])
    except ValidationError as error:
        raise DataError(f"estimator.embeddings: {error}") from error
    parts = getattr(config, "parts", (config,))
    if any(isinstance(part, PolicyEmbeddings) for part in parts):
        raise DataError(
            "estimator.embeddings: those of the policy are known in a run alone; name {type: ngrams}, "
            "{type: sentence, path: ...}, {type: lm, path: ...} or several of them joined"
        )
    return config


def features_of(texts: Sequence[str], config: EmbeddingsConfig, context: Context) -> Features:
    """Embed the questions, each part by itself, so that their columns are known apart."""
    embedder = embedder_of(config, _no_policy, context)
    parts = [embed(texts, part, context) for part in embedder.parts or (embedder,)]
    matrix = parts[0] if len(parts) == 1 else np.hstack(parts)
    return Features(embedder, matrix, tuple(part.shape[1] for part in parts))


def fit_estimator(
    recorded: RecordedRates,
    features: Features,
    settings: FitSettings,
    progress: Callable[[str, int, int], None],
) -> tuple[FittedAdapter, FitReport]:
    """Fit to most questions, and judge every contender on some of the others, policy by policy.

    Raises:
        DataError: too few questions are left on one side.
    """
    counts, seed = recorded.counts, settings.training.seed
    sides = sides_of(recorded.groups, settings.held_out_fraction, seed)
    fitted = fit_to(features, counts, recorded.groups, sides, settings, progress)
    split = Split(0, counts, sides, counts, range(len(counts.policies)))
    rng = np.random.default_rng([seed, 3])
    forecasts = judge(split, features.matrix, fitted, settings.training.reference_size, rng)
    num_judged = int((sides == JUDGED).sum())
    if not forecasts["adapter"]:
        raise DataError(
            f"no policy answered {MIN_JUDGED} of the {num_judged} questions that are held out to judge by; "
            "give more questions"
        )
    scores = {
        name: _all(scores_of(items, lambda item: np.ones(len(item.mean), bool), seed))
        for name, items in forecasts.items()
    }
    report = FitReport(
        embedder=features.embedder.id,
        width=features.matrix.shape[1],
        files=recorded.files,
        num_policies=len(counts.policies),
        num_questions=len(counts.question_ids),
        num_trained_on=int((sides == TRAINED_ON).sum()),
        num_stopped_by=int((sides == STOPPING).sum()),
        num_judged=num_judged,
        settings=settings,
        best_epoch=fitted.best_epoch,
        penalty=fitted.easiness.penalty,
        gains=fitted.easiness.gains,
        scores=scores,
    )
    return fitted, report


def sides_of(
    groups: Int[np.ndarray, "questions"], held_out_fraction: float, seed: int
) -> Int[np.ndarray, "questions"]:
    """Put each group of near duplicates on a side by chance: trained on, stopped by, or judged."""
    names, places = np.unique(groups, return_inverse=True)
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    half = round(held_out_fraction * len(names) / 2)
    sides = np.full(len(names), TRAINED_ON)
    sides[order[:half]], sides[order[half : 2 * half]] = STOPPING, JUDGED
    return np.asarray(sides[places])


def fit_to(
    features: Features,
    counts: SolveCounts,
    groups: Int[np.ndarray, "questions"],
    sides: Int[np.ndarray, "questions"],
    settings: FitSettings,
    progress: Callable[[str, int, int], None],
) -> FittedAdapter:
    """Fit an adapter to the questions of two sides; the judged ones are not looked at.

    Raises:
        DataError: too few questions are trained on or stopped by.
    """
    kept: Bool[np.ndarray, questions] = sides != JUDGED
    shape = AdapterShape(
        features.embedder.id,
        features.matrix.shape[1],
        settings.hidden_width,
        settings.num_layers,
        settings.dropout,
    )
    try:
        return fit_adapter(
            features.matrix[kept],
            features.widths,
            counts.of_questions(kept),
            groups[kept],
            sides[kept] == STOPPING,
            shape,
            settings.training,
            progress,
        )
    except ValueError as error:
        raise DataError(str(error)) from error


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before anything is fitted.

    Raises:
        DataError: its folder is missing or may not be written to.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"--out {path}: cannot be written; give a file in a folder that exists")


def fit_text(report: FitReport) -> str:
    """Lay a fit's scores out as a table."""
    policies = "policy" if report.num_policies == 1 else "policies"
    head = (
        f"{report.num_questions} questions, {report.num_policies} {policies}: trained on "
        f"{report.num_trained_on}, stopped by {report.num_stopped_by}, judged on {report.num_judged}; epoch "
        f"{report.best_epoch} of {report.settings.training.num_epochs} was best (0 is ridge)\n"
        "score +- half of the 95 % interval, over the judged questions\n\n"
    )
    return head + scores_text(report.scores)


def scores_text(rows: dict[str, Scores]) -> str:
    """Lay scores out as a table, a line per contender."""
    table = [("predictor", "pearson", "nll", "brier", "slope")]
    table += [(name, *cells_of(scores)) for name, scores in rows.items()]
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    return "\n".join(lines)


def cells_of(scores: Scores) -> tuple[str, str, str, str]:
    """Write correlation, likelihood, Brier score and slope with half of their intervals."""
    return (
        cell(scores.pearson, 3),
        cell(scores.nll_nats, 4),
        cell(scores.brier, 4),
        cell(scores.slope, 2),
    )


def _all(scores: Scores | None) -> Scores:
    assert scores is not None, "there are forecasts"
    return scores


def _no_policy(texts: Sequence[str], **options: object) -> Any:
    raise AssertionError("embeddings of the policy are refused before")
