"""The commands that judge estimators on traces."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dteframe.cli.loading import files_and_overrides
from dteframe.cli.options import AsJson, Debug, NoLocalPlugins, PluginPaths, chosen_plugins
from dteframe.cli.talk import as_json_text, say, telling_errors


def evaluate(  # noqa: PLR0913  # one parameter per option of the command
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace, a run folder, or a published table of rates.")
    ],
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes and sweeps: of each run the estimator, the selector and the size of a plan count.",
        ),
    ],
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            metavar="N",
            help="How often the policy is met.",
            show_default="as often as every question was measured",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Replays of each recipe.")] = 3,
    part: Annotated[
        str,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Every N-th question from number I on; choose settings on one part, report another.",
        ),
    ] = "0/1",
    diagram: Annotated[
        Path | None,
        typer.Option(
            "--diagram", metavar="FILE", help="Draw a reliability diagram into this file (.png or .svg)."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="Compare all recipes with this one, question by question: differences with intervals.",
        ),
    ] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Replay a trace as if training, with each recipe's estimator and selector, and score their predictions.

    At each round the references are measured, all other questions are predicted, the selector chooses, and
    what it chose is measured: every prediction comes before its measurement.
    """
    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        from dteframe.engine.run_folder import cache_folder
        from dteframe.experiments.comparison_text import comparison_text, differences_text
        from dteframe.experiments.evaluate_estimators import Settings, compare, load_all, part_of
        from dteframe.experiments.reliability_plot import check_diagram, draw_reliability

        if diagram is not None:
            check_diagram(diagram)
        paths, overrides = files_and_overrides(recipes)
        loaded = load_all(paths, overrides, plugins)
        with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
            settings = Settings(
                cache_folder=cache_folder(),
                run_folder=Path(folder),
                tell=lambda text: say([text]),
                num_rounds=rounds,
                num_seeds=seeds,
                part=part_of(part),
                against=against,
            )
            comparison = compare(trace, loaded, settings)
        if diagram is not None:
            draw_reliability(comparison, diagram)
        if as_json:
            typer.echo(as_json_text(comparison))
            return
        typer.echo(comparison_text(comparison))
        if against is not None:
            typer.echo("\n" + differences_text(comparison))
