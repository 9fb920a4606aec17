"""The commands for many runs: do a sweep, and compare its arms."""

from __future__ import annotations

import fnmatch
import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from dteframe.cli.options import (
    AsJson,
    Debug,
    NoLocalPlugins,
    Overrides,
    PluginPaths,
    chosen_plugins,
    plugin_words,
)
from dteframe.cli.talk import INTERRUPTED, as_json_text, say, telling_errors
from dteframe.engine.run_folder import locked
from dteframe.errors import DTEFrameError
from dteframe.experiments.ray_jobs import do_on_ray
from dteframe.experiments.run_curves import read_runs
from dteframe.experiments.slurm_script import slurm_script
from dteframe.experiments.speedup import compare_runs
from dteframe.experiments.speedup_plots import write_plots
from dteframe.experiments.speedup_text import speedup_text
from dteframe.experiments.sweep_jobs import Job, Outcome, do_locally, jobs_of, write_sweep_file
from dteframe.plan_text import Workload, workload
from dteframe.recipe.sweep import Sweep, load_sweep
from dteframe.recipe.sweep_config import ComparisonConfig
from dteframe.registry import load_registry

Executor: TypeAlias = Literal["local", "ray", "slurm", "commands"]


def sweep(  # noqa: PLR0913  # one parameter per option of the command
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's YAML file.")],
    overrides: Overrides = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Where run folders are.",
            show_default="runs/ and the file's name",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="PATTERN",
            help="Do only the runs whose names are like this, such as '*-s[0-2]'; may be given several "
            "times.",
            show_default="all",
        ),
    ] = None,
    executor: Annotated[
        Executor,
        typer.Option(
            "--executor",
            help="Where runs are done: here, on a Ray cluster, or by what is printed: a job array for "
            "SLURM, or a shell command per run.",
        ),
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            help="Runs at a time.",
            show_default="one here, as many as fit elsewhere",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="Let each run have N processes.")
    ] = None,
    cpus: Annotated[
        int, typer.Option("--cpus", metavar="N", min=1, help="Cores that a run asks of a cluster.")
    ] = 1,
    gpus: Annotated[
        int, typer.Option("--gpus", metavar="N", min=0, help="GPUs that a run asks of a cluster.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and their size; do none.")
    ] = False,
    plugins: PluginPaths = None,
    no_local_plugins: NoLocalPlugins = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Do all runs of a sweep, after checking all of them; the same command goes on where it stopped.

    Each run is a process of its own, whose talk goes to DIR/logs. A run that fails is tried once more, from
    its newest checkpoint. The folder is printed; DIR/sweep.json says what the runs are, for dteframe compare.
    """
    with telling_errors(debug):
        plugins = chosen_plugins(plugins, no_local_plugins)
        loaded = load_sweep(sweep_file, overrides or (), lambda recipe: load_registry(plugins, near=recipe))
        say(loaded.notes)
        if only:
            loaded = _only(loaded, only)
        folder = runs or Path("runs") / sweep_file.stem
        options = [] if processes is None else ["--processes", str(processes)]
        options += plugin_words(plugins)
        to_do = jobs_of(loaded, folder, options)
        if dry_run:
            sizes = [workload(run.recipe) for run in loaded.runs]
            lines = [_dry_line(job, size) for job, size in zip(to_do, sizes, strict=True)]
            typer.echo(as_json_text(sizes) if as_json else "\n".join(lines))
            return
        write_sweep_file(loaded, folder)
        commands = [["dteframe", *job.words] for job in to_do]
        if executor == "commands":
            pairs = zip(loaded.runs, commands, strict=True)
            described = [
                {"name": run.name, "seed": run.seed, "variants": run.variants, "command": command}
                for run, command in pairs
            ]
            typer.echo(as_json_text(described) if as_json else "\n".join(map(shlex.join, commands)))
        elif executor == "slurm":
            typer.echo(slurm_script(sweep_file.stem, commands, jobs, cpus, gpus), nl=False)
        else:
            tell = _teller(len(to_do))
            with locked(folder):
                if executor == "ray":
                    outcomes = do_on_ray(to_do, jobs, cpus, gpus, tell)
                else:
                    outcomes = do_locally(to_do, jobs or 1, tell)
            typer.echo(as_json_text(outcomes) if as_json else folder)
            _end(outcomes)


def _only(sweep: Sweep, patterns: Sequence[str]) -> Sweep:
    """Leave the runs whose names are like one of the patterns."""
    names = [run.name for run in sweep.runs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise DTEFrameError(
                f"--only {pattern}: none of the {len(names)} runs is called like this; "
                f"the first is {names[0]!r}, --dry-run prints all"
            )
    kept = [run for run in sweep.runs if any(fnmatch.fnmatchcase(run.name, item) for item in patterns)]
    return replace(sweep, runs=tuple(kept))


def compare(  # noqa: PLR0913  # one parameter per option of the command
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="A sweep's folder, or the folders of single runs.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="ARM",
            help="The arm that the others are held against, where no sweep says it.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            metavar="FRACTION",
            min=0.0,
            max=1.0,
            help="Share of the baseline's steps after which its success rate is the target.",
            show_default="the sweep's, else 0.8",
        ),
    ] = None,
    trailing: Annotated[
        int | None,
        typer.Option(
            "--trailing",
            metavar="N",
            min=1,
            help="Evaluations whose mean is a success rate.",
            show_default="the sweep's, else 3",
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="DIR", help="Draw the curves, and what each arm saved, into this folder."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the arms of a sweep: time, tokens, rollouts and steps to the success rate of the baseline.

    Runs are paired by seed. One that never reaches the target counts at all that it paid. Of single runs the
    name up to its last -s and number is the arm.
    """
    with telling_errors(debug):
        read = read_runs(runs)
        rules = _rules(read.comparison, baseline, target, trailing)
        comparison = compare_runs(read, rules)
        if plots is not None:
            written = write_plots(read.curves, comparison, plots)
            say([f"drew {', '.join(map(str, written))}"])
        typer.echo(as_json_text(comparison) if as_json else speedup_text(comparison))


def _rules(
    fixed: ComparisonConfig | None, baseline: str | None, target: float | None, trailing: int | None
) -> ComparisonConfig:
    """Take the sweep's rules, changed by the options, which is said; or make some of the options."""
    if fixed is None and baseline is None:
        raise DTEFrameError("compare: no sweep says what the baseline is; give --baseline ARM")
    before = (fixed or ComparisonConfig(axis="arm", baseline=baseline or "")).model_dump()
    given = {"baseline": baseline, "target_budget_fraction": target, "trailing_evaluations": trailing}
    changes = {key: value for key, value in given.items() if value not in (None, before[key])}
    if fixed is not None and changes:
        told = ", ".join(f"{key} {before[key]} -> {value}" for key, value in changes.items())
        say([f"note: not what was fixed before the runs: {told}"])
    return ComparisonConfig.model_validate({**before, **changes})


def _dry_line(job: Job, size: Workload) -> str:
    """Say what a run would take."""
    state = "finished" if job.is_finished() else "to do"
    return (
        f"{job.name}: {state}; {size.max_steps} steps, {size.total_fresh_rollouts_at_least:,} to "
        f"{size.total_fresh_rollouts_at_most + size.total_reference_rollouts:,} rollouts for training, "
        f"{size.total_evaluation_rollouts_at_most:,} for evaluation, "
        f"{size.generated_tokens_at_most:,} tokens at most"
    )


def _teller(num_runs: int) -> Callable[[Outcome], None]:
    """Make what says how each run ended, with a count."""
    numbers = itertools.count(1)

    def tell(outcome: Outcome) -> None:
        how = {
            "finished": f"finished in {outcome.seconds:.0f} s",
            "was finished": "was finished before",
            "failed": f"failed {outcome.num_attempts} times; {outcome.log} says why",
            "interrupted": "was interrupted",
        }[outcome.status]
        again = " at the second attempt" if outcome.status == "finished" and outcome.num_attempts > 1 else ""
        say([f"[{next(numbers)}/{num_runs}] {outcome.name}: {how}{again}"])

    return tell


def _end(outcomes: Sequence[Outcome]) -> None:
    """Say what is not finished, and end with its exit code."""
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    num_interrupted = sum(outcome.status == "interrupted" for outcome in outcomes)
    if failed:
        say([f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}"])
    if num_interrupted:
        say([f"{num_interrupted} of {len(outcomes)} runs are left; the same command goes on with them"])
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)
