"""The commands that fit adapters of the attention estimator to recorded rates, and judge such fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from dteframe.cli.loading import files_and_overrides
from dteframe.cli.options import AsJson, Debug, NoLocalPlugins, PluginPaths, chosen_plugins
from dteframe.cli.talk import as_json_text, say, telling_errors

if TYPE_CHECKING:
    from dteframe import Context
    from dteframe.estimators.embedding_options import EmbeddingsConfig

RECIPE_SUFFIXES = (".yaml", ".yml")
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="Where embeddings are computed.")]


def fit(  # noqa: PLR0913  # one parameter per option of the command
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TABLE... [RECIPE] [KEY=VALUE]...",
            help="Traces, run folders or published tables, and the recipe whose estimator.embeddings count.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Write the adapter to this file.")],
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of split and training.")] = 1,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out", metavar="SHARE", min=0.01, max=0.9, help="Of the questions, not fitted to."
        ),
    ] = 0.2,
    without: Annotated[
        list[Path] | None,
        typer.Option(
            "--without",
            metavar="TABLE",
            help="Leave out this table's questions and near duplicates: it can be replayed then.",
        ),
    ] = None,
    device: Device = "cpu",
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on recorded success rates, and judge it on questions that were held out.

    A recipe names the file as estimator.adapter, with the embeddings that it was fitted to: hashed n-grams
    (estimator.embeddings={type: ngrams}) unless a recipe is given.
    """
    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        from dteframe.experiments.fit_estimator import fit_settings, fit_tables, fit_text

        tables, recipes, overrides = sorted_words(words)
        with redirect_stdout(sys.stderr), surroundings(device) as context:
            ((_, embeddings),) = named_embeddings(recipes[:1], overrides, plugins)
            settings = fit_settings(seed, held_out)
            report = fit_tables(tables, without or (), embeddings, settings, context, out)
        typer.echo(as_json_text(report) if as_json else fit_text(report))
        say([f"the adapter is in {out}"])


def transfer(  # noqa: PLR0913  # one parameter per option of the command
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TABLE RECIPE... [KEY=VALUE]...",
            help="The table to judge on, and recipes or sweeps whose estimator.embeddings are compared.",
        ),
    ],
    unseen: Annotated[
        Literal["questions", "policies"],
        typer.Option("--unseen", help="What is held out beside questions: time, or families of policies."),
    ] = "questions",
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="TABLE", help="Fit to this table too; may be given several times."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Splits into five folds.")] = 3,
    device: Device = "cpu",
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit adapters to four fifths of a table's questions, and judge them on the others, five folds per seed.

    With --unseen questions the first half of the time is fitted to and the second judged; with --unseen
    policies a fifth of the families is judged, on questions that are new as well.
    """
    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        from dteframe.experiments.transfer import transfer_tables, transfer_text

        tables, recipes, overrides = sorted_words(words)
        with redirect_stdout(sys.stderr), surroundings(device) as context:
            named = named_embeddings(recipes, overrides, plugins)
            results = transfer_tables(tables, also or (), named, unseen, seeds, context)
        typer.echo(as_json_text(results) if as_json else transfer_text(results))


def sorted_words(words: Sequence[str]) -> tuple[list[Path], list[Path], list[str]]:
    """Tell tables, recipes (.yaml) and overrides apart."""
    paths, overrides = files_and_overrides(words)
    recipes = [path for path in paths if path.suffix in RECIPE_SUFFIXES]
    return [path for path in paths if path not in recipes], recipes, overrides


def named_embeddings(
    recipes: Sequence[Path], overrides: Sequence[str], plugins: Sequence[Path] | None
) -> list[tuple[str, EmbeddingsConfig]]:
    """Give the embeddings of each recipe and variant with its name; hashed n-grams where none is given."""
    from dteframe.experiments.evaluate_estimators import load_all
    from dteframe.experiments.fit_estimator import embeddings_of

    if not recipes:
        return [("ngrams", embeddings_of(None))]
    return [(name, embeddings_of(loaded.recipe)) for name, loaded, _ in load_all(recipes, overrides, plugins)]


@contextmanager
def surroundings(device: str) -> Iterator[Context]:
    """Give the cache, a folder that lasts as long as this, and progress on stderr."""
    from dteframe import Context
    from dteframe.engine.run_folder import cache_folder

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with TemporaryDirectory() as folder, console.status("") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")

        yield Context(cache_folder(), Path(folder), device, 0, progress, lambda text: say([text]))
