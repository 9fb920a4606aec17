"""The command that trains."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dteframe.cli.loading import load, one_voice
from dteframe.cli.options import AsJson, Debug, Overrides, PluginPaths, RecipeFile
from dteframe.cli.talk import Warnings, announce_local_plugins, as_json_text, say, telling_errors


def run(  # noqa: PLR0913  # one parameter per option of the command
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run folders are.")] = Path(
        "runs"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="Train in N processes, which torchrun starts."),
    ] = None,
    plugins: PluginPaths = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train as a recipe says; everything is written to the folder DIR/NAME, whose path is printed."""
    # torch reads it when it is loaded: threads that spin while they wait cost a busy machine dearly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes is not None:
        arguments = ["run", str(recipe), *(overrides or ()), "--runs", str(runs)]
        arguments += [word for path in plugins or () for word in ("--plugins", str(path))]
        flags = {"--resume": resume, "--json": as_json, "--debug": debug}
        arguments += [name for name, is_given in flags.items() if is_given]
        with telling_errors(debug):
            # What is wrong with the recipe is told once, and before anything is started.
            load(recipe, overrides, plugins)
            from dteframe.engine.launch import run_processes

            raise typer.Exit(run_processes(processes, arguments))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Schedulers end jobs as Ctrl-C does.
    with telling_errors(debug):
        with one_voice():
            loaded, registry = load(recipe, overrides, plugins)
        if all(tracker.type != "console" for tracker in loaded.recipe.tracker):
            registry.hooks.register(Warnings())
        from dteframe.engine.distributed import started
        from dteframe.engine.follow import follow_recipe
        from dteframe.engine.run import run_recipe

        with redirect_stdout(sys.stderr), started(loaded.recipe.training.device) as team:
            # What plugins print is talk; stdout is data.
            if not team.is_main:
                follow_recipe(loaded, registry, runs, team)
                return
            say(loaded.notes)
            announce_local_plugins(registry)
            summary = run_recipe(loaded, registry, runs, resume, team)
        typer.echo(as_json_text(summary) if as_json else summary.run_folder)
