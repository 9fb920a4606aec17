"""Read several recipes and report every problem of each: what ``dteframe validate`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dteframe.errors import Problem, RecipeError
from dteframe.recipe import load_recipe
from dteframe.registry import Registry, load_registry


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading one recipe showed."""

    recipe: str
    """Its path, as given."""
    ok: bool
    problems: tuple[Problem, ...]
    """Why it cannot be run, in the order of the file; empty if it can."""
    notes: tuple[str, ...]
    """What its user should know all the same."""


def validate_recipes(
    recipes: Sequence[Path], overrides: Sequence[str], plugin_paths: Sequence[Path] | None
) -> list[Verdict]:
    """Read each recipe, with the same overrides and the plugins that it would run with.

    Raises:
        PluginError: a plugin cannot be loaded.
    """
    registries: dict[Path, Registry] = {}
    verdicts = []
    for recipe in recipes:
        folder = recipe.resolve().parent
        if folder not in registries:
            registries[folder] = load_registry(plugin_paths, near=recipe)
        try:
            loaded = load_recipe(recipe, overrides, registries[folder])
        except RecipeError as error:
            verdicts.append(Verdict(str(recipe), False, error.problems, ()))
        else:
            verdicts.append(Verdict(str(recipe), True, (), loaded.notes))
    return verdicts
