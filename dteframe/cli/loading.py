"""From the words of a command line to recipes and plugins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dteframe.cli.talk import say
from dteframe.errors import DTEFrameError, Problem, RecipeError, SilentError
from dteframe.recipe import LoadedRecipe, load_recipe
from dteframe.registry import Registry, load_registry


def files_and_overrides(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell recipes from overrides: a word with ``=`` is an override unless it is a file's name."""
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    return [Path(word) for word in words if word not in overrides], overrides


def load_and_say(
    recipe: Path, overrides: Sequence[str] | None, plugins: Sequence[Path] | None
) -> tuple[LoadedRecipe, Registry]:
    """Load a recipe with the plugins near it, and say what its user should know."""
    loaded, registry = load(recipe, overrides, plugins)
    say(loaded.notes)
    return loaded, registry


def load(
    recipe: Path, overrides: Sequence[str] | None, plugins: Sequence[Path] | None
) -> tuple[LoadedRecipe, Registry]:
    """Load a recipe with the plugins near it."""
    strays = [word for word in overrides or () if "=" not in word]
    if strays:
        what = f"{strays[0]!r} is no key=value; one recipe is read, then keys such as training.max_steps=20"
        raise RecipeError([Problem("command line", "", what)])
    registry = load_registry(plugins, near=recipe)
    return load_recipe(recipe, overrides or (), registry), registry


def plugins_here(plugins: Sequence[Path] | None) -> Registry:
    """Load the plugins near the current folder, and say which files are left out."""
    registry = load_registry(plugins, near=Path.cwd())
    say([f"{problem}; left out" for problem in registry.broken])
    return registry


@contextmanager
def one_voice() -> Iterator[None]:
    """Leave an error that all processes of a machine come upon to the first that torchrun started there.

    Another machine may lack a file that the main one has: each has a voice.
    """
    try:
        yield
    except DTEFrameError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0":
            raise SilentError("the first process of this machine says it") from error
        raise
