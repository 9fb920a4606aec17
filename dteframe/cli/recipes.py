"""The commands that read recipes and run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dteframe.cli.loading import files_and_overrides, load_and_say, plugins_here
from dteframe.cli.options import (
    AsJson,
    Debug,
    NoLocalPlugins,
    Overrides,
    PluginPaths,
    RecipeFile,
    chosen_plugins,
)
from dteframe.cli.talk import as_json_text, plain, say, telling_errors, write_file
from dteframe.errors import Problem, RecipeError
from dteframe.recipe import json_schema


def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes and sweeps, and keys to override in all of them.",
        ),
    ],
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read recipes, and all runs of sweeps, without running them, and report every problem of each."""
    from dteframe.validation import validate_recipes

    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        paths, overrides = files_and_overrides(recipes)
        if not paths:
            raise RecipeError(
                [Problem("command line", "", "no recipe is given; name at least one YAML file")]
            )
        verdicts = validate_recipes(paths, overrides, plugins)
        for verdict in verdicts:
            say(verdict.notes)
            say([str(problem) for problem in verdict.problems])
            if verdict.ok and not as_json:
                runs = "" if verdict.num_runs is None else f", {verdict.num_runs} runs"
                typer.echo(f"{verdict.recipe}: ok{runs}")
        if as_json:
            typer.echo(as_json_text(verdicts))
        if not all(verdict.ok for verdict in verdicts):
            raise typer.Exit(RecipeError.exit_code)


def plan(  # noqa: PLR0913  # one parameter per option of the command
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes that share model and questions.")
    ] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", metavar="GIB", help="Memory of a GPU, to be held against.")
    ] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain what a recipe asks for: questions, rollouts, tokens, optimizer steps, memory."""
    from dteframe.disk_plan import disk_plan, disk_text
    from dteframe.memory_plan import device_bytes, memory_plan
    from dteframe.plan_text import memory_text, plan_text, workload

    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        loaded, _ = load_and_say(recipe, overrides, plugins)
        work, sizes = workload(loaded.recipe), loaded.recipe.model.sizes()
        available = device_bytes(loaded.recipe, processes, gpu_memory)
        memory = memory_plan(loaded.recipe, sizes, processes, available) if sizes else None
        disk = disk_plan(loaded.recipe, sizes) if sizes else None
        if as_json:
            told = {**plain(work), "memory": memory, "device_bytes": available, "disk": disk}
            typer.echo(as_json_text(told))
        else:
            typer.echo(f"{plan_text(work)}\n{memory_text(memory, available)}\n{disk_text(disk)}")


def schema(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it to this file.")] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of recipes, plugins included, for the completion of an editor."""
    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        text = as_json_text(json_schema(plugins_here(plugins)))
        if out is None:
            typer.echo(text)
        else:
            write_file("--out", out, text + "\n")
