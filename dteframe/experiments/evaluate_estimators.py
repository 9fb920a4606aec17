"""Judge the estimators and selectors of recipes on a trace, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from dteframe.contracts import Estimator, Selector
from dteframe.errors import DataError, Problem, RecipeError
from dteframe.experiments.ceiling import best_informative_fraction
from dteframe.experiments.published_traces import read_any_trace
from dteframe.experiments.replay_trace import Rounds, quiet_context, replay, rounds_of
from dteframe.experiments.scores import Bin, Score, Scores, mean_with_interval, reliability, scores_of
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
    """How often the policy is met; None is as often as every question was measured."""
    num_seeds: int = 3
    """Of references and choices; the outcomes are the trace's."""
    part: tuple[int, int] = (0, 1)
    """(number, of how many): every n-th question from that one on, so that settings can be chosen on one part
    and reported on another."""


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
    seconds_per_round: float
    """Of predicting and choosing."""
    reliability: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recipes on one trace."""

    trace: str
    num_questions: int
    num_rounds: int
    num_chosen: int
    """Questions of a round's plan; the first recipe's."""
    num_seeds: int
    uniform_informative_fraction: float
    """Of all questions in all rounds: what a uniform choice has."""
    best_informative_fraction: float
    """If the true rates were known."""
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
    """
    rounds = rounds_of(read_any_trace(trace), settings.num_rounds).part(*settings.part)
    first = recipes[0][1].recipe.arithmetic()
    num_chosen = min(first.questions_per_plan, len(rounds.questions))
    is_mixed = (rounds.successes > 0) & (rounds.successes < rounds.trials)
    share = num_chosen / len(rounds.questions)
    best = [
        best_informative_fraction(solved, tried, share)
        for solved, tried in zip(rounds.successes, rounds.trials, strict=True)
    ]
    verdicts = []
    for name, loaded, registry in recipes:
        settings.tell(f"replaying {name}: {loaded.recipe.estimator.type}, {loaded.recipe.selector.type}")
        verdicts.append(_judge(rounds, name, loaded.recipe, registry, settings))
    return Comparison(
        trace=str(trace) if settings.part == (0, 1) else "{}, part {}/{}".format(trace, *settings.part),
        num_questions=len(rounds.questions),
        num_rounds=len(rounds.policy_versions),
        num_chosen=num_chosen,
        num_seeds=settings.num_seeds,
        uniform_informative_fraction=float(is_mixed.mean()),
        best_informative_fraction=float(np.mean(best)),
        verdicts=tuple(verdicts),
    )


def _judge(
    rounds: Rounds,
    name: str,
    recipe: Recipe,
    registry: Registry,
    settings: Settings,
) -> Verdict:
    results = []
    for seed in range(settings.num_seeds):
        context = quiet_context(settings.cache_folder, settings.run_folder, seed, settings.tell)
        estimator = registry.get("estimator", recipe.estimator.type).component(recipe.estimator, context)
        selector = registry.get("selector", recipe.selector.type).component(recipe.selector, context)
        results.append(
            replay(rounds, cast(Estimator, estimator), cast(Selector, selector), recipe.arithmetic(), seed)
        )
    forecasts = [result.forecasts for result in results]
    everything = scores_of(forecasts, lambda item: np.ones(len(item.mean), bool), 0)
    assert everything is not None, "a round predicts more questions than it rolls out"
    shares = np.concatenate([result.informative_fractions for result in results])
    shares = shares[~np.isnan(shares)]
    return Verdict(
        recipe=name,
        estimator=recipe.estimator.type,
        selector=recipe.selector.type,
        everything=everything,
        seen=scores_of(forecasts, lambda item: item.is_seen, 0),
        unseen=scores_of(forecasts, lambda item: ~item.is_seen, 0),
        informative_fraction=mean_with_interval(shares, 0) if len(shares) else None,
        reference_rollouts=float(np.mean([result.reference_rollouts for result in results])),
        seconds_per_round=float(np.mean([result.seconds for result in results]))
        / len(rounds.policy_versions),
        reliability=reliability(forecasts),
    )
