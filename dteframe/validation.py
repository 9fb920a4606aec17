"""Read recipes and sweeps and report every problem of each: what ``dteframe validate`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dteframe.errors import Problem, RecipeError
from dteframe.recipe import load_recipe
from dteframe.recipe.sweep import is_sweep_file, load_sweep
from dteframe.registry import Registry, load_registry


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading one recipe, or one sweep, showed."""

    recipe: str
    """Its path, as given."""
    ok: bool
    problems: tuple[Problem, ...]
    """Why it cannot be run, in the order of the file; empty if it can."""
    notes: tuple[str, ...]
    """What its user should know all the same."""
    num_runs: int | None = None
    """Of a sweep without problems, its runs; null for a recipe."""


def validate_recipes(
    recipes: Sequence[Path], overrides: Sequence[str], plugin_paths: Sequence[Path] | None
) -> list[Verdict]:
    """Read each recipe or sweep, with the same overrides and the plugins that it would run with.

    Raises:
        PluginError: a plugin cannot be loaded.
    """
    registries: dict[Path, Registry] = {}

    def registry_near(recipe: Path) -> Registry:
        folder = recipe.resolve().parent
        if folder not in registries:
            registries[folder] = load_registry(plugin_paths, near=recipe)
        return registries[folder]

    verdicts = []
    for recipe in recipes:
        try:
            if is_sweep_file(recipe):
                sweep = load_sweep(recipe, overrides, registry_near)
                verdicts.append(Verdict(str(recipe), True, (), sweep.notes, len(sweep.runs)))
            else:
                loaded = load_recipe(recipe, overrides, registry_near(recipe))
                verdicts.append(Verdict(str(recipe), True, (), loaded.notes))
        except RecipeError as error:
            verdicts.append(Verdict(str(recipe), False, error.problems, ()))
    return verdicts
