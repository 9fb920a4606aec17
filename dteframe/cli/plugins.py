"""The commands for plugins and their authors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dteframe.cli.loading import plugins_here
from dteframe.cli.options import AsJson, Debug, NoLocalPlugins, PluginPaths, chosen_plugins
from dteframe.cli.talk import as_json_text, say, telling_errors
from dteframe.errors import PluginError
from dteframe.plugin_sources import shown


def list_all_plugins(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="Such as estimator.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this one's options.")] = None,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List everything that a recipe can name, with its origin; with NAME, describe all of its options."""
    from dteframe.plugin_listing import description_text, list_plugins, listing_text

    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        found = list_plugins(plugins_here(plugins), kind, name)
        if as_json:
            typer.echo(as_json_text(found))
        else:
            typer.echo(description_text(found[0]) if name is not None else listing_text(found))


def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Plugin files or packages.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the promises of the plugins in files: what every plugin of their kind must do."""
    with telling_errors(debug):
        from dteframe.testing.check_files import check_files, checked_text

        outcomes = []
        for checked in check_files(files):
            outcomes.append(checked)
            if not as_json:
                typer.echo(checked_text(checked))
        if as_json:
            typer.echo(as_json_text(outcomes))
        if any(checked.broken for checked in outcomes):
            raise typer.Exit(PluginError.exit_code)


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Such as estimator.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What recipes will call it.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write it.")] = Path("plugins"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a plugin that works, and its test in tests/ beside the folder, from the template of its kind."""
    from dteframe.new_plugin import write_plugin

    with telling_errors(debug):
        written = [shown(path) for path in write_plugin(kind, name, folder)]
        typer.echo(as_json_text(written) if as_json else "\n".join(written))
        say([f"next: dteframe check {written[0]}; pytest {written[1]}"])
