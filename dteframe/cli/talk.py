"""What commands say: data on stdout, talk and errors on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console

from dteframe import hookimpl
from dteframe.errors import DTEFrameError, SilentError
from dteframe.registry import Registry

INTERRUPTED = 130
"""Exit code after control-C, as shells have it."""


class Warnings:
    """Shows warnings of a run that has no console."""

    @hookimpl
    def dteframe_warned(self, message: str) -> None:
        """Say it on stderr."""
        say([f"warning: {message}"])


@contextmanager
def telling_errors(debug: bool) -> Iterator[None]:
    """Word errors for people, without a traceback unless they ask for it, and choose the exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except SilentError:
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        say([": ".join(["interrupted", *getattr(interrupt, "__notes__", [])])])
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001  # the last place where an error can be put into words
        if debug:
            traceback.print_exc(file=sys.stderr)
        notes = getattr(error, "__notes__", [])
        # A component words what is wrong with its input as a ValueError; anything else is a surprise.
        is_worded = isinstance(error, DTEFrameError) or (isinstance(error, ValueError) and bool(notes))
        told = str(error) if is_worded else f"{type(error).__name__}: {error}"
        advice = [] if is_worded or debug else ["--debug shows where it happened"]
        say([told, *notes, *advice])
        raise typer.Exit(error.exit_code if isinstance(error, DTEFrameError) else 1) from None


def announce_local_plugins(registry: Registry) -> None:
    """Say which code from outside takes part, so that a run by accident is noticed."""
    origins = [origin for origin in registry.origins() if origin.label != "built-in"]
    say([f"plugin {origin.label} ({(origin.sha256 or 'no hash')[:12]})" for origin in origins])


def write_file(option: str, path: Path, text: str) -> None:
    """Write the file that an option names."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DTEFrameError(
            f"{option} {path}: cannot be written ({error.strerror}); give another file"
        ) from error


def say(sentences: Sequence[str]) -> None:
    """Say sentences on stderr, a line each."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)


def as_json_text(value: Any) -> str:
    """Put a result into JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=plain)


def plain(value: Any) -> Any:
    """Give the fields of a record or an option section, and the text of a path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
