"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
