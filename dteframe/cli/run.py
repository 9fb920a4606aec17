"""The command that trains."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dteframe.cli.loading import load, one_voice
from dteframe.cli.options import (
    AsJson,
    Debug,
    NoLocalPlugins,
    Overrides,
    PluginPaths,
    RecipeFile,
    chosen_plugins,
    plugin_words,
)
from dteframe.cli.talk import Warnings, announce_local_plugins, as_json_text, say, telling_errors
from dteframe.engine.fork import fork_run
from dteframe.engine.run_folder import check_run_folder, locked
from dteframe.engine.stop import SECONDS_TO_STOP, SIGNALS, Stop


def run(  # noqa: PLR0913  # one parameter per option of the command
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run folders are.")] = Path(
        "runs"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork",
            metavar="NAME",
            help="Branch a run of this name off the newest checkpoint; the recipe may differ from there on.",
        ),
    ] = None,
    stop_within: Annotated[
        float,
        typer.Option(
            "--stop-within",
            metavar="SECONDS",
            min=0.0,
            help="After Ctrl-C or SIGTERM, time for the step to end; its checkpoint comes on top.",
        ),
    ] = SECONDS_TO_STOP,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="Train in N processes, which torchrun starts."),
    ] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train as a recipe says; everything is written to the folder DIR/NAME, whose path is printed."""
    # torch reads it when it is loaded: threads that spin while they wait cost a busy machine dearly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with telling_errors(debug), _stopping(stop_within, is_launcher=processes is not None) as stop:
        plugins = chosen_plugins(plugins, no_local_plugins)
        with one_voice():
            loaded, registry = load(recipe, overrides, plugins)
            source = runs / loaded.recipe.name
            if fork is not None:
                overrides, resume = [*(overrides or ()), f"name={fork}"], True
                loaded, registry = load(recipe, overrides, plugins)
        folder = runs / loaded.recipe.name
        if _is_main():  # What the folder alone forbids is told before torch is loaded.
            if fork is not None:
                fork_run(source, folder, loaded.recipe, lambda message: say([f"warning: {message}"]))
            with locked(folder):
                check_run_folder(folder, loaded.recipe, resume=resume)
        if processes is not None:
            from dteframe.engine.launch import run_processes

            arguments = ["run", str(recipe), *(overrides or ()), "--runs", str(runs)]
            arguments += plugin_words(plugins)
            flags = {"--resume": resume, "--json": as_json, "--debug": debug}
            arguments += [name for name, is_given in flags.items() if is_given]
            raise typer.Exit(run_processes(processes, [*arguments, "--stop-within", str(stop_within)]))
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
            summary = run_recipe(loaded, registry, runs, resume, team, stop)
        typer.echo(as_json_text(summary) if as_json else summary.run_folder)


def _is_main() -> bool:
    """Whether this process leads, or is alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _stopping(seconds: float, *, is_launcher: bool) -> Iterator[Stop]:
    """Listen to Ctrl-C and SIGTERM; processes that follow leave them to the main one, which ends them."""
    stop = Stop(seconds)
    if is_launcher:  # It has handlers of its own.
        yield stop
    elif _is_main():
        with stop.on_signals(_tell if "RANK" not in os.environ else lambda sentence: None):
            yield stop
    else:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        yield stop
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(sentence: str) -> None:
    """Say a sentence in a signal handler, which may have come in the middle of another."""
    os.write(sys.stderr.fileno(), f"\n{sentence}\n".encode())
