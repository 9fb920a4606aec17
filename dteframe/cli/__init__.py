"""The commands: each calls one function elsewhere; stdout is data, stderr is talk."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Annotated

import typer

import dteframe
from dteframe.cli.adapters import fit, transfer
from dteframe.cli.estimator import evaluate
from dteframe.cli.plugins import check, list_all_plugins, new
from dteframe.cli.recipes import plan, schema, validate
from dteframe.cli.run import run
from dteframe.cli.sweep import compare, sweep
from dteframe.cli.verify import verify_resume

app = typer.Typer(
    help="Data-efficient reinforcement fine-tuning of language models.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(verify_resume)
app.command()(validate)
app.command()(plan)
app.command()(sweep)
app.command()(compare)
app.command(name="plugins")(list_all_plugins)
app.command()(schema)
app.command()(check)
app.command()(new)

estimator_app = typer.Typer(help="Judge estimators on traces, and fit adapters.", no_args_is_help=True)
estimator_app.command()(evaluate)
estimator_app.command()(fit)
estimator_app.command()(transfer)
app.add_typer(estimator_app, name="estimator")


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if "TORCHELASTIC_RUN_ID" in os.environ and isinstance(end.code, int):
            _end_process(end.code)
        raise


def _end_process(code: int) -> None:
    """End one of torchrun's processes once all Python work is done, without taking the interpreter down.

    There a thread of gloo that still holds a tensor aborts a process whose run is complete, and torchrun then
    ends the others (https://github.com/pytorch/pytorch/pull/179291).
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # what the interpreter itself calls
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
