"""The commands: each calls one function elsewhere; stdout is data, stderr is talk."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

import dteframe
from dteframe import hookimpl
from dteframe.errors import DTEFrameError, PluginError, Problem, RecipeError, SilentError
from dteframe.plugin_sources import shown
from dteframe.recipe import LoadedRecipe, json_schema, load_recipe
from dteframe.registry import Registry, load_registry

INTERRUPTED = 130
"""Exit code after control-C, as shells have it."""

app = typer.Typer(
    help="Data-efficient reinforcement fine-tuning of language models.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

estimator_app = typer.Typer(help="Judge estimators on traces.", no_args_is_help=True)
app.add_typer(estimator_app, name="estimator")

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


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _no_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"dteframe {dteframe.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
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
        with _telling_errors(debug):
            # What is wrong with the recipe is told once, and before anything is started.
            _load(recipe, overrides, plugins)
            from dteframe.engine.launch import run_processes

            raise typer.Exit(run_processes(processes, arguments))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Schedulers end jobs as Ctrl-C does.
    with _telling_errors(debug):
        with _one_voice():
            loaded, registry = _load(recipe, overrides, plugins)
        if all(tracker.type != "console" for tracker in loaded.recipe.tracker):
            registry.hooks.register(_Warnings())
        from dteframe.engine.distributed import started
        from dteframe.engine.follow import follow_recipe
        from dteframe.engine.run import run_recipe

        with redirect_stdout(sys.stderr), started(loaded.recipe.training.device) as team:
            # What plugins print is talk; stdout is data.
            if not team.is_main:
                follow_recipe(loaded, registry, runs, team)
                return
            _say(loaded.notes)
            _announce_local_plugins(registry)
            summary = run_recipe(loaded, registry, runs, resume, team)
        typer.echo(_json(summary) if as_json else summary.run_folder)


@app.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes and sweeps, and keys to override in all of them.",
        ),
    ],
    plugins: PluginPaths = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read recipes, and all runs of sweeps, without running them, and report every problem of each."""
    from dteframe.validation import validate_recipes

    with _telling_errors(debug):
        paths, overrides = _files_and_overrides(recipes)
        if not paths:
            raise RecipeError(
                [Problem("command line", "", "no recipe is given; name at least one YAML file")]
            )
        verdicts = validate_recipes(paths, overrides, plugins)
        for verdict in verdicts:
            _say(verdict.notes)
            _say([str(problem) for problem in verdict.problems])
            if verdict.ok and not as_json:
                runs = "" if verdict.num_runs is None else f", {verdict.num_runs} runs"
                typer.echo(f"{verdict.recipe}: ok{runs}")
        if as_json:
            typer.echo(_json(verdicts))
        if not all(verdict.ok for verdict in verdicts):
            raise typer.Exit(RecipeError.exit_code)


@app.command()
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain what a recipe asks for: questions, rollouts, tokens, optimizer steps, memory."""
    from dteframe.memory_plan import device_bytes, memory_plan
    from dteframe.plan_text import memory_text, plan_text, workload

    with _telling_errors(debug):
        loaded, _ = _loaded(recipe, overrides, plugins)
        work, sizes = workload(loaded.recipe), loaded.recipe.model.sizes()
        available = device_bytes(loaded.recipe, processes, gpu_memory)
        memory = memory_plan(loaded.recipe, sizes, processes, available) if sizes else None
        if as_json:
            typer.echo(_json({**_plain(work), "memory": memory, "device_bytes": available}))
        else:
            typer.echo(f"{plan_text(work)}\n{memory_text(memory, available)}")


@app.command()
def sweep(  # noqa: PLR0913  # one parameter per option of the command
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's YAML file.")],
    overrides: Overrides = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Where run folders will be.",
            show_default="runs/ and the file's name",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Print commands that go on from checkpoints.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="Let each run have N processes.")
    ] = None,
    plugins: PluginPaths = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print one shell command per run of a sweep, after checking all of them; nothing is run.

    The commands stand for themselves, one a line, in any order: pipe them to a shell, to xargs, or to the
    tasks of a job array. Paths are seen from this folder.
    """
    from dteframe.recipe.sweep import load_sweep

    with _telling_errors(debug):
        loaded = load_sweep(sweep_file, overrides or (), lambda recipe: load_registry(plugins, near=recipe))
        _say(loaded.notes)
        options = ["--runs", str(runs or Path("runs") / sweep_file.stem), *(["--resume"] if resume else [])]
        if processes is not None:
            options += ["--processes", str(processes)]
        for path in plugins or ():
            options += ["--plugins", str(path)]
        commands = [["dteframe", "run", str(loaded.recipe), *run.overrides, *options] for run in loaded.runs]
        if as_json:
            pairs = zip(loaded.runs, commands, strict=True)
            typer.echo(_json([{**_plain(run), "command": command} for run, command in pairs]))
        else:
            typer.echo("\n".join(shlex.join(command) for command in commands))


@app.command(name="plugins")
def list_all_plugins(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="Such as estimator.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this one's options.")] = None,
    plugins: PluginPaths = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List everything that a recipe can name, with its origin; with NAME, describe all of its options."""
    from dteframe.plugin_listing import description_text, list_plugins, listing_text

    with _telling_errors(debug):
        found = list_plugins(load_registry(plugins, near=Path.cwd()), kind, name)
        if as_json:
            typer.echo(_json(found))
        else:
            typer.echo(description_text(found[0]) if name is not None else listing_text(found))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it to this file.")] = None,
    plugins: PluginPaths = None,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of recipes, plugins included, for the completion of an editor."""
    with _telling_errors(debug):
        text = _json(json_schema(load_registry(plugins, near=Path.cwd())))
        if out is None:
            typer.echo(text)
        else:
            _write("--out", out, text + "\n")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Plugin files or packages.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the promises of the plugins in files: what every plugin of their kind must do."""
    with _telling_errors(debug):
        from dteframe.testing.check_files import check_files, checked_text

        outcomes = []
        for checked in check_files(files):
            outcomes.append(checked)
            if not as_json:
                typer.echo(checked_text(checked))
        if as_json:
            typer.echo(_json(outcomes))
        if any(checked.broken for checked in outcomes):
            raise typer.Exit(PluginError.exit_code)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Such as estimator.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What recipes will call it.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write it.")] = Path("plugins"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a plugin that works, and its test in tests/ beside the folder, from the template of its kind."""
    from dteframe.new_plugin import write_plugin

    with _telling_errors(debug):
        written = [shown(path) for path in write_plugin(kind, name, folder)]
        typer.echo(_json(written) if as_json else "\n".join(written))
        _say([f"next: dteframe check {written[0]}; pytest {written[1]}"])


@estimator_app.command()
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
        typer.Option("--diagram", metavar="FILE", help="Write a reliability diagram (SVG) to this file."),
    ] = None,
    plugins: PluginPaths = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Replay a trace as if training, with each recipe's estimator and selector, and score their predictions.

    At each round the references are measured, all other questions are predicted, the selector chooses, and
    what it chose is measured: every prediction comes before its measurement.
    """
    with _telling_errors(debug):
        from dteframe.engine.run_folder import cache_folder
        from dteframe.experiments.comparison_text import comparison_text, reliability_svg
        from dteframe.experiments.evaluate_estimators import Settings, compare, load_all, part_of

        paths, overrides = _files_and_overrides(recipes)
        loaded = load_all(paths, overrides, plugins)
        with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
            settings = Settings(
                cache_folder(), Path(folder), lambda text: _say([text]), rounds, seeds, part_of(part)
            )
            comparison = compare(trace, loaded, settings)
        if diagram is not None:
            _write("--diagram", diagram, reliability_svg(comparison))
        typer.echo(_json(comparison) if as_json else comparison_text(comparison))


class _Warnings:
    """Shows warnings of a run that has no console."""

    @hookimpl
    def dteframe_warned(self, message: str) -> None:
        """Say it on stderr."""
        _say([f"warning: {message}"])


@contextmanager
def _telling_errors(debug: bool) -> Iterator[None]:
    """Word errors for people, without a traceback unless they ask for it, and choose the exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except SilentError:
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        _say(["interrupted", *getattr(interrupt, "__notes__", [])])
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001  # the last place where an error can be put into words
        if debug:
            traceback.print_exc(file=sys.stderr)
        notes = getattr(error, "__notes__", [])
        # A component words what is wrong with its input as a ValueError; anything else is a surprise.
        is_worded = isinstance(error, DTEFrameError) or (isinstance(error, ValueError) and bool(notes))
        told = str(error) if is_worded else f"{type(error).__name__}: {error}"
        advice = [] if is_worded or debug else ["--debug shows where it happened"]
        _say([told, *notes, *advice])
        raise typer.Exit(error.exit_code if isinstance(error, DTEFrameError) else 1) from None


def _files_and_overrides(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell recipes from overrides: a word with ``=`` is an override unless it is a file's name."""
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    return [Path(word) for word in words if word not in overrides], overrides


def _write(option: str, path: Path, text: str) -> None:
    """Write the file that an option names."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DTEFrameError(
            f"{option} {path}: cannot be written ({error.strerror}); give another file"
        ) from error


def _loaded(
    recipe: Path, overrides: Sequence[str] | None, plugins: Sequence[Path] | None
) -> tuple[LoadedRecipe, Registry]:
    """Load a recipe with the plugins near it, and say what its user should know."""
    loaded, registry = _load(recipe, overrides, plugins)
    _say(loaded.notes)
    return loaded, registry


def _load(
    recipe: Path, overrides: Sequence[str] | None, plugins: Sequence[Path] | None
) -> tuple[LoadedRecipe, Registry]:
    strays = [word for word in overrides or () if "=" not in word]
    if strays:
        what = f"{strays[0]!r} is no key=value; one recipe is read, then keys such as training.max_steps=20"
        raise RecipeError([Problem("command line", "", what)])
    registry = load_registry(plugins, near=recipe)
    return load_recipe(recipe, overrides or (), registry), registry


@contextmanager
def _one_voice() -> Iterator[None]:
    """Leave an error that all processes of a machine come upon to the first that torchrun started there.

    Another machine may lack a file that the main one has: each has a voice.
    """
    try:
        yield
    except DTEFrameError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0":
            raise SilentError("the first process of this machine says it") from error
        raise


def _announce_local_plugins(registry: Registry) -> None:
    """Say which code from outside takes part, so that a run by accident is noticed."""
    origins = [origin for origin in registry.origins() if origin.label != "built-in"]
    _say([f"plugin {origin.label} ({(origin.sha256 or 'no hash')[:12]})" for origin in origins])


def _say(sentences: Sequence[str]) -> None:
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
