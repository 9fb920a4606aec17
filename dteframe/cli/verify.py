"""The command that holds resuming to its promise."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dteframe.cli.loading import load, load_and_say
from dteframe.cli.options import (
    AsJson,
    Debug,
    NoLocalPlugins,
    Overrides,
    PluginPaths,
    RecipeFile,
    chosen_plugins,
)
from dteframe.cli.talk import as_json_text, say, telling_errors

DEFAULT_STOPS = ("2:scored", "3:planned", "3:evaluated", "5:finished")


def verify_resume(  # noqa: PLR0913  # one parameter per option of the command
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps of each run.")] = 6,
    stops: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="STEP:MOMENT",
            help="Stop there: planned, scored, evaluated or finished; may be given several times.",
            show_default=" ".join(DEFAULT_STOPS),
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", metavar="DIR", help="Keep both run folders here; without, nothing is kept."),
    ] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe straight and with stops, and say whether both are the same run.

    Checkpoints are written at every second step, evaluations at every third where the recipe has any; each
    part is a process of its own. Weights, optimizer, selections, rollouts and metrics are compared, seconds
    apart.
    """
    from dteframe.experiments.verify_resume import Part, StopAt
    from dteframe.experiments.verify_resume import verify_resume as verified

    with telling_errors(debug), ExitStack() as stack:
        plugins = chosen_plugins(plugins, no_local_plugins)
        loaded, _ = load_and_say(recipe, overrides, plugins)
        evaluates = 3 if loaded.recipe.training.evaluate_every else 0
        sizes = (f"training.max_steps={steps}", f"training.evaluate_every={evaluates}")
        words = ("training.checkpoint_every=2", *sizes, *(overrides or ()), "tracker=[{type: jsonl}]")
        load(recipe, words, plugins)
        folder = runs or Path(stack.enter_context(TemporaryDirectory(prefix="verify_resume_")))
        part = Part(recipe, words, None if plugins is None else tuple(plugins), folder, None, resume=False)
        wanted = [StopAt.parsed(text) for text in stops or DEFAULT_STOPS]
        verdict = verified(part, steps, wanted, lambda sentence: say([sentence]))
        if as_json:
            typer.echo(as_json_text(verdict))
        elif verdict.same:
            typer.echo(f"same: {verdict.steps} steps, stopped {len(verdict.stops)} times")
        else:
            typer.echo(f"different: {verdict.first_difference}")
        if not verdict.same:
            raise typer.Exit(1)
