"""The folder of a run: its recipe, its manifest, and whether it may be used."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

from dteframe.engine.checkpoint_folder import replace_file
from dteframe.errors import DataError, ResumeError
from dteframe.recipe import Recipe
from dteframe.registry import Registry
from dteframe.reports import RunSummary
from dteframe.trackers.jsonl import FILE_NAMES

RECIPE, MANIFEST, SUMMARY, LOCK = "recipe.yaml", "manifest.json", "summary.json", ".lock"
WRITTEN_BY_A_RUN = (
    *FILE_NAMES,
    "trace.parquet",
    "tensorboard",
    "checkpoints",
    "policy",
    "adapter",
    "non_finite",
    SUMMARY,
)
CACHE_VARIABLE = "DTEFRAME_CACHE"
DEFAULT_CACHE = "~/.cache/dteframe"
PACKAGES = ("dteframe", "torch", "transformers", "datasets", "numpy", "pydantic", "pluggy", "safetensors")
CHANGEABLE = (
    "training.max_steps",
    "training.checkpoint_every",
    "training.save_total_limit",
    "training.evaluate_every",
    "name",
    "tracker",
)
"""Keys that may differ when a run is resumed: how long it goes, what is kept and who is told, not what it
does."""
NOT_FORKED = ("model", "dataset", "training.float32_master_weights")
"""Keys that decide what a checkpoint holds: a run that branches off cannot change them."""


NOTHING = object()
"""Stands for a key that a recipe does not have."""


def check_run_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that the folder may be used; nothing is changed.

    Raises:
        ResumeError: the folder holds a run and ``resume`` is off, or its recipe differs in what matters.
    """
    if not has_begun(folder):
        return
    if not resume:
        raise ResumeError(
            f"{folder}: holds a run already; add --resume to go on with it, or give another name=..."
        )
    written = folder / RECIPE
    schedule = recipe.training.lr_scheduler_type
    changeable = CHANGEABLE if schedule == "constant" else CHANGEABLE[1:]
    differences = [text for key, text in differences_from(written, recipe) if not is_below(key, changeable)]
    if differences:
        raise ResumeError(
            f"{folder}: cannot be resumed with another recipe; resume with {written}, branch off with "
            "--fork NAME, or give another name=... to start afresh. What differs:\n" + "\n".join(differences)
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder and keep other processes out of it; the lock goes with the process, however it ends.

    A folder in which nothing was written is removed again.

    Raises:
        ResumeError: another process holds it; names it.
        DataError: the folder or its lock cannot be made, or it is a link to another.
    """
    path = folder / LOCK
    for part in (folder, *(folder / name for name in WRITTEN_BY_A_RUN)):
        if part.is_symlink():
            raise DataError(
                f"{part}: is a symbolic link to {os.readlink(part)!r}, and a run would remove files there; "
                "give the folder itself with --runs, or move the link away"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except BlockingIOError as error:
        raise ResumeError(
            f"{folder}: another process writes to it ({_text_of(path)}); wait for it, or give another "
            "name=..."
        ) from error
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made, written to or locked ({error.strerror}); give another place with "
            "--runs"
        ) from error
    with file:
        try:
            file.truncate(0)
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
            yield
        finally:
            with suppress(OSError):  # A folder with something in it is not removed.
                path.unlink()
                folder.rmdir()


def _lock(path: Path) -> TextIO:
    """Open and lock a file that nobody else holds, and that still has its name once it is locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else "which has just ended"


def cache_folder() -> Path:
    """Make the folder for what is costly to make again.

    Raises:
        DataError: it cannot be made.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{cache}: the cache folder cannot be made ({error.strerror}); set {CACHE_VARIABLE} elsewhere"
        ) from error
    return cache


def has_begun(folder: Path) -> bool:
    """Whether a run in the folder has got so far that something would be lost by starting over."""
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def write_run_folder(folder: Path, recipe: Recipe, registry: Registry, step: int) -> None:
    """Write the resolved recipe, and what it runs with from ``step`` on, below what it ran with before."""
    manifest: dict[str, Any] = {"forked_from": None, "starts": []}
    if step > 0:
        manifest = read_manifest(folder)
    start = {"step": step, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
    manifest["starts"].append({**start, **_surroundings(registry)})
    replace_file(folder / RECIPE, recipe.to_yaml())
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what ``write_run_folder`` wrote.

    Raises:
        ResumeError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for plugin in manifest["starts"][-1]["plugins"]:
            str(plugin["origin"]), str(plugin["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); restore it, or give another name=..."
        ) from error
    return dict(manifest)


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Write how the run ended, warnings and questions left out included."""
    text = json.dumps(dataclasses.asdict(summary), indent=1, default=str)
    replace_file(folder / SUMMARY, text + "\n")


def clear_run_folder(folder: Path) -> None:
    """Remove what a run wrote before its first checkpoint, so that it can start over."""
    for name in WRITTEN_BY_A_RUN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def changed_plugins(folder: Path, registry: Registry) -> list[str]:
    """Say which of the user's plugins have other code than when the run was last started."""
    last_start = read_manifest(folder)["starts"][-1]
    before = {item["origin"]: item["sha256"] for item in last_start["plugins"]}
    now = {origin.label: origin.sha256 for origin in registry.origins() if origin.label != "built-in"}
    return [
        f"{label}: this plugin has changed since the run began; what follows is made with the new code"
        for label, sha256 in sorted(now.items())
        if before.get(label, sha256) != sha256
    ]


def differences_from(written: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """List the keys in which a recipe differs from a written one, each with ``key: old -> new``.

    Raises:
        ResumeError: the written one cannot be read.
    """
    try:
        before = _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ResumeError(
            f"{written}: the run's recipe cannot be read ({reason}); restore it, or give another name=..."
        ) from error
    now = _flat(yaml.safe_load(recipe.to_yaml()))
    found = []
    for key in sorted(before.keys() | now.keys()):
        there, here = before.get(key, NOTHING), now.get(key, NOTHING)
        if there != here:
            found.append((key, f"  {key}: {_shown(there)} -> {_shown(here)}"))
    return found


def _shown(value: object) -> str:
    return "nothing" if value is NOTHING else repr(value)


def is_below(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of ``names`` or inside of it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _surroundings(registry: Registry) -> dict[str, Any]:
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "plugins": [
            {
                "origin": origin.label,
                "path": str(origin.path) if origin.path else None,
                "sha256": origin.sha256,
            }
            for origin in registry.origins()
        ],
    }


def _flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {path: value}
    flat: dict[str, object] = {}
    for key, item in items:
        flat |= _flat(item, f"{path}.{key}" if path else key)
    return flat
