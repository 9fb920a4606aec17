"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dteframe.errors import PluginError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as training.max_steps=20."),
]


PluginPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugins",
        metavar="PATH",
        help="Plugin file or folder, instead of the nearest plugins/ folder; may be given several times.",
    ),
]


NoLocalPlugins = Annotated[
    bool,
    typer.Option("--no-local-plugins", help="Load no plugin files: installed and built-in plugins only."),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def chosen_plugins(paths: list[Path] | None, no_local_plugins: bool) -> list[Path] | None:
    """Give the plugin files that are to be loaded: none, those given, or (None) those that are found."""
    if no_local_plugins and paths:
        raise PluginError(f"--no-local-plugins: --plugins {paths[0]} is given too; leave one of the two out")
    return [] if no_local_plugins else paths


def plugin_words(paths: list[Path] | None) -> list[str]:
    """Give the options that choose the same plugin files for another command."""
    if paths is None:
        return []
    return [word for path in paths for word in ("--plugins", str(path))] or ["--no-local-plugins"]
