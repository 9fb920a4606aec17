"""Judge the estimators and selectors of recipes on a trace, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Estimator, Selector
from dteframe.errors import DataError, Problem, RecipeError
from dteframe.experiments.ceiling import best_informative_fraction
from dteframe.experiments.published_traces import read_any_trace
from dteframe.experiments.replay_trace import Replayed, quiet_context, replay
from dteframe.experiments.rounds import Rounds, rounds_of
from dteframe.experiments.scores import (
    Bin,
    Differences,
    Score,
    Scores,
    differences_of,
    mean_with_interval,
    reliability,
    scores_of,
)
from dteframe.recipe import LoadedRecipe, Recipe, load_recipe
from dteframe.recipe.sweep import is_sweep_file, load_sweep
from dteframe.registry import Registry, load_registry


@dataclass(frozen=True, slots=True)
class Settings:
    """How a trace is replayed."""

    cache_folder: Path
    """Of embeddings."""
    run_folder: Path
    """Where components may write."""
    tell: Callable[[str], None]
    """Gets warnings, and how far things are."""
    num_rounds: int | None = None
    """How often the policy is met; None is as often as every question was measured, or what leaves enough
    groups to a round where some questions do not come back."""
    num_seeds: int = 3
    """Of references and choices; the outcomes are the trace's."""
    part: tuple[int, int] = (0, 1)
    """(number, of how many): every n-th question from that one on, so that settings can be chosen on one part
    and reported on another."""
    against: str | None = None
    """Name of the recipe that the others are compared with, question by question; None: none is."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one recipe's estimator and selector did on a trace."""

    recipe: str
    estimator: str
    selector: str
    everything: Scores
    """Of all questions that were not rolled out as references in the round."""
    seen: Scores | None
    """Of those that had been measured in an earlier round."""
    unseen: Scores | None
    """Of the others."""
    informative_fraction: Score | None
    """Of the groups that the selector chose; the rounds are what the bootstrap draws. None where references
    filled every plan."""
    reference_rollouts: float
    """Spent per seed."""
    replaced_references: float
    """Per seed: references that were not measured in their round; others, that were, took their places."""
    missing_references: float
    """Per seed: references for which there was no other."""
    predicting_seconds_per_round: float
    """Of the estimator, observing included."""
    choosing_seconds_per_round: float
    """Of the selector."""
    reliability: tuple[Bin, ...]
    less_baseline: Advantage | None
    """Against the recipe that all are compared with; None for that one, and where none is."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """How one recipe did, less how another did, in the same rounds of the same seeds."""

    everything: Differences | None
    """None where no question was predicted by both."""
    seen: Differences | None
    """Of questions that both had measured in an earlier round."""
    unseen: Differences | None
    """Of questions that neither had."""
    informative_fraction: Score | None
    """Of the chosen groups; the rounds are what the bootstrap draws."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recipes on one trace."""

    trace: str
    num_questions: int
    num_rounds: int
    num_groups: int
    """Measured groups in all rounds: as many as rounds times questions, where all questions come back."""
    left_out: Mapping[str, int]
    """Groups of the trace that are in no round, counted by reason."""
    num_chosen: int
    """Questions of a round's plan, at most; the first recipe's."""
    num_seeds: int
    uniform_informative_fraction: float
    """Of all questions in all rounds: what a uniform choice has."""
    best_informative_fraction: float
    """If the true rates were known."""
    against: str | None
    """The recipe that the others are compared with."""
    verdicts: tuple[Verdict, ...]


def load_all(
    paths: Sequence[Path], overrides: Sequence[str], plugins: Sequence[Path] | None
) -> list[tuple[str, LoadedRecipe, Registry]]:
    """Load recipes and all variants of sweeps, under their names; a run's seed does not matter here.

    Raises:
        RecipeError: nothing is named, or something is wrong with it.
    """
    if not paths:
        raise RecipeError([Problem("command line", "", "no recipe is given; name at least one YAML file")])
    loaded = []
    for path in paths:
        registry = load_registry(plugins, near=path)
        if not is_sweep_file(path):
            recipe = load_recipe(path, overrides, registry)
            loaded.append((recipe.recipe.name, recipe, registry))
            continue
        sweep = load_sweep(path, overrides, lambda recipe: load_registry(plugins, near=recipe))
        variants = {tuple(run.variants.items()): run for run in reversed(sweep.runs)}
        for run in reversed(variants.values()):
            name = "-".join(run.variants.values())
            loaded.append((name, load_recipe(sweep.recipe, run.overrides, registry), registry))
    return loaded


def part_of(text: str) -> tuple[int, int]:
    """Read ``I/N`` as (number, of how many).

    Raises:
        DataError: it is not two whole numbers with 0 <= I < N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise DataError(f"--part: {text!r} is no part; write I/N with 0 <= I < N, such as 1/2")
    return int(match[1]), int(match[2])


def compare(
    trace: Path, recipes: Sequence[tuple[str, LoadedRecipe, Registry]], settings: Settings
) -> Comparison:
    """Replay the trace with every recipe, once per seed.

    Args:
        trace: a trace, a run folder or a published table.
        recipes: names and recipes, at least one; estimator, selector and the sizes of a plan count.
        settings: how to replay.

    Raises:
        DataError: ``settings.against`` is none of the recipes.
    """
    names = [name for name, _, _ in recipes]
    if settings.against is not None and settings.against not in names:
        raise DataError(f"--against: {settings.against!r} is none of the recipes {', '.join(names)}")
    rounds = rounds_of(read_any_trace(trace), settings.num_rounds).part(*settings.part)
    num_chosen = min(recipes[0][1].recipe.arithmetic().questions_per_plan, len(rounds.questions))
    best = [
        best_informative_fraction(solved[is_there], tried[is_there], min(num_chosen / is_there.sum(), 1.0))
        for solved, tried, is_there in zip(rounds.successes, rounds.trials, rounds.is_measured, strict=True)
    ]
    baseline: Sequence[Replayed] | None = None
    verdicts: dict[str, Verdict] = {}
    for name, loaded, registry in sorted(recipes, key=lambda item: item[0] != settings.against):
        settings.tell(f"replaying {name}: {loaded.recipe.estimator.type}, {loaded.recipe.selector.type}")
        results = _replays(rounds, loaded.recipe, registry, settings)
        verdicts[name] = _verdict(name, loaded.recipe, results, baseline)
        if name == settings.against:
            baseline = results
    return Comparison(
        trace=str(trace) if settings.part == (0, 1) else "{}, part {}/{}".format(trace, *settings.part),
        num_questions=len(rounds.questions),
        num_rounds=len(rounds.policy_versions),
        num_groups=int(rounds.is_measured.sum()),
        left_out=rounds.left_out,
        num_chosen=num_chosen,
        num_seeds=settings.num_seeds,
        uniform_informative_fraction=float(rounds.is_mixed[rounds.is_measured].mean()),
        best_informative_fraction=float(np.mean(best)),
        against=settings.against,
        verdicts=tuple(verdicts[name] for name in names),
    )


def _replays(rounds: Rounds, recipe: Recipe, registry: Registry, settings: Settings) -> list[Replayed]:
    results = []
    for seed in range(settings.num_seeds):
        context = quiet_context(settings.cache_folder, settings.run_folder, seed, settings.tell)
        estimator = registry.get("estimator", recipe.estimator.type).component(recipe.estimator, context)
        selector = registry.get("selector", recipe.selector.type).component(recipe.selector, context)
        results.append(
            replay(rounds, cast(Estimator, estimator), cast(Selector, selector), recipe.arithmetic(), seed)
        )
    return results


def _verdict(
    name: str, recipe: Recipe, results: Sequence[Replayed], baseline: Sequence[Replayed] | None
) -> Verdict:
    forecasts = [result.forecasts for result in results]
    everything = scores_of(forecasts, lambda item: np.ones(len(item.mean), bool), 0)
    assert everything is not None, "a round predicts more questions than it rolls out"
    shares = np.concatenate([result.informative_fractions for result in results])
    num_rounds = len(results[0].informative_fractions)

    def mean_of(figure: str) -> float:
        return float(np.mean([getattr(result, figure) for result in results]))

    return Verdict(
        recipe=name,
        estimator=recipe.estimator.type,
        selector=recipe.selector.type,
        everything=everything,
        seen=scores_of(forecasts, lambda item: item.is_seen, 0),
        unseen=scores_of(forecasts, lambda item: ~item.is_seen, 0),
        informative_fraction=_mean_of_known(shares),
        reference_rollouts=mean_of("reference_rollouts"),
        replaced_references=mean_of("replaced_references"),
        missing_references=mean_of("missing_references"),
        predicting_seconds_per_round=mean_of("predicting_seconds") / num_rounds,
        choosing_seconds_per_round=mean_of("choosing_seconds") / num_rounds,
        reliability=reliability(forecasts),
        less_baseline=None if baseline is None else _advantage(results, baseline),
    )


def _advantage(results: Sequence[Replayed], baseline: Sequence[Replayed]) -> Advantage:
    ours, theirs = ([result.forecasts for result in side] for side in (results, baseline))
    shares, other_shares = (
        np.concatenate([result.informative_fractions for result in side]) for side in (results, baseline)
    )
    return Advantage(
        everything=differences_of(ours, theirs, are_seen=None, seed=0),
        seen=differences_of(ours, theirs, are_seen=True, seed=0),
        unseen=differences_of(ours, theirs, are_seen=False, seed=0),
        informative_fraction=_mean_of_known(shares - other_shares),
    )


def _mean_of_known(values: Float[np.ndarray, "rounds"]) -> Score | None:
    known = values[~np.isnan(values)]
    return mean_with_interval(known, 0) if len(known) else None
