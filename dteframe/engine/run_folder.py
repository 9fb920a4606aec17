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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dteframe.errors import DataError, ResumeError
from dteframe.recipe import Recipe
from dteframe.registry import Registry
from dteframe.reports import RunSummary

RECIPE, MANIFEST, SUMMARY, LOCK = "recipe.yaml", "manifest.json", "summary.json", ".lock"
WRITTEN_BY_A_RUN = (
    "metrics.jsonl",
    "rollouts.jsonl",
    "selections.jsonl",
    "trace.jsonl",
    "trace.parquet",
    "tensorboard",
    "checkpoints",
    "policy",
    "adapter",
    SUMMARY,
)
CACHE_VARIABLE = "DTEFRAME_CACHE"
DEFAULT_CACHE = "~/.cache/dteframe"
PACKAGES = ("dteframe", "torch", "transformers", "datasets", "numpy", "pydantic", "pluggy", "safetensors")
CHANGEABLE = ("training.max_steps", "training.checkpoint_every", "training.evaluate_every", "tracker")
"""Keys that may differ when a run is resumed: how long it goes and who is told, not what it does."""


def check_run_folder(
    folder: Path, recipe: Recipe, registry: Registry, *, resume: bool, warn: Callable[[str], None]
) -> None:
    """Check that the folder may be used; nothing that a run wrote is changed.

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
    differences = _differences(written, recipe)
    if differences:
        raise ResumeError(
            f"{folder}: cannot be resumed with another recipe; resume with {written}, "
            "or give another name=... to start afresh. What differs:\n" + "\n".join(differences)
        )
    for path in _changed_plugins(folder, registry):
        warn(f"{path}: this plugin has changed since the run began; what follows is made with the new code")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder and keep other processes out of it; the lock goes with the process, however it ends.

    Raises:
        ResumeError: another process holds it; names it.
        DataError: the folder or its lock cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{folder}: the run folder cannot be made ({error.strerror}); give another place with --runs"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ResumeError(
                f"{folder}: another process writes to it ({file.read().strip()}); wait for it, or give "
                "another name=..."
            ) from error
        except OSError as error:
            raise DataError(
                f"{folder}: the file system cannot lock it ({error.strerror}); give another place with --runs"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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


def write_run_folder(folder: Path, recipe: Recipe, registry: Registry) -> None:
    """Write the resolved recipe, and what it runs with."""
    _write(folder / RECIPE, recipe.to_yaml())
    _write(folder / MANIFEST, json.dumps(_manifest(registry), indent=1) + "\n")


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Write how the run ended, warnings and questions left out included."""
    text = json.dumps(dataclasses.asdict(summary), indent=1, default=str)
    _write(folder / SUMMARY, text + "\n")


def clear_run_folder(folder: Path) -> None:
    """Remove what a run wrote before its first checkpoint, so that it can start over."""
    for name in WRITTEN_BY_A_RUN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a full disk leaves the old one, without which a run cannot be resumed."""
    fresh = path.with_name(f".{path.name}.writing")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _changed_plugins(folder: Path, registry: Registry) -> list[str]:
    """List the plugins of the user whose code is not what the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        before = {item["origin"]: item["sha256"] for item in manifest["plugins"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{folder / MANIFEST}: cannot be read ({error}); restore it, or give another name=..."
        ) from error
    now = {origin.label: origin.sha256 for origin in registry.origins() if origin.label != "built-in"}
    return sorted(label for label, sha256 in now.items() if before.get(label, sha256) != sha256)


def _manifest(registry: Registry) -> dict[str, Any]:
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


def _differences(written: Path, recipe: Recipe) -> list[str]:
    """List the keys that differ: ``training.learning_rate: 0.001 there, 0.01 now``."""
    try:
        before = _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ResumeError(
            f"{written}: the run's recipe cannot be read ({reason}); restore it, or give another name=..."
        ) from error
    now = _flat(yaml.safe_load(recipe.to_yaml()))
    schedule = recipe.training.lr_scheduler_type
    changeable = CHANGEABLE if schedule == "constant" else CHANGEABLE[1:]
    found = []
    for key in sorted(before.keys() | now.keys()):
        there, here = before.get(key, "nothing"), now.get(key, "nothing")
        if there != here and not any(key == name or key.startswith(f"{name}.") for name in changeable):
            found.append(f"  {key}: {there!r} there, {here!r} now")
    return found


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
