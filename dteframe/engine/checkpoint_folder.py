"""Folders that are whole or not there: written beside their place, renamed, and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dteframe
from dteframe.errors import ResumeError

CHECKPOINTS, MANIFEST, BEST = "checkpoints", "manifest.json", "best.json"
FORMAT = 1
"""Of what a checkpoint holds; raised when a new version could not go on from an old one."""


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of ``folder`` once all of it is on the disk."""
    fresh = fresh_folder(folder)
    yield fresh
    put_in_place(fresh, folder)


def fresh_folder(folder: Path) -> Path:
    """Make the empty folder beside ``folder`` that is to take its place."""
    fresh = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def put_in_place(fresh: Path, folder: Path) -> None:
    """Bring a folder to the disk, and let it take the place of ``folder``."""
    for path in [*fresh.rglob("*"), fresh]:
        _to_disk(path)
    remove(folder)
    fresh.rename(folder)
    _to_disk(folder.parent)


def write_manifest(folder: Path) -> None:
    """List the files of a checkpoint with their sizes and hashes, in ``manifest.json`` beside them."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "dteframe": dteframe.__version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it, and a full disk, has the old text or the new."""
    fresh = path.with_name(f".{path.name}.writing")
    fresh.write_text(text, encoding="utf-8")
    _to_disk(fresh)
    fresh.replace(path)


def remove(folder: Path) -> None:
    """Remove a folder; should that be interrupted, no part of it is left under its name."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.removing")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def name_of(step: int) -> str:
    """Name the checkpoint of a step; the names sort as the steps do."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Say at which step a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints_of(run_folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest first, whole or not."""
    folders = (run_folder / CHECKPOINTS).glob("step_*")
    return sorted(folders, key=lambda folder: (len(folder.name), folder.name), reverse=True)


def keep_newest(newest: Path, limit: int | None, best: Path | None) -> None:
    """Remove checkpoints that are not kept, and what was left of writing and removing.

    Args:
        newest: the one that was just written; later ones are of a course that the run has left.
        limit: how many of the newest are kept; None for all.
        best: one that is kept besides.
    """
    for unfinished in newest.parent.glob(".step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    folders = checkpoints_of(newest.parent.parent)
    place = folders.index(newest)
    kept = folders[place:] if limit is None else folders[place : place + limit]
    for folder in folders:
        if folder not in kept and folder != best:
            remove(folder)


def newest_checkpoint(run_folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest whole checkpoint, or None if there is none at all; damaged ones are passed over.

    Raises:
        ResumeError: there are checkpoints, but every one is damaged; or another version has written it.
    """
    damages: list[str] = []
    for folder in checkpoints_of(run_folder):
        damage = damage_of(folder)
        if damage is None:
            _refuse_other_format(folder)
            for found in damages:
                warn(f"{found}; using the checkpoint before it, {folder.name}")
            return folder
        damages.append(f"{folder}: {damage}")
    if damages:
        raise ResumeError(
            f"{run_folder}: no checkpoint is whole; restore one, or give another name=... to start afresh\n"
            + "\n".join(damages)
        )
    return None


def damage_of(folder: Path, *, reads_all: bool = True) -> str | None:
    """Say what is wrong with a checkpoint's files, or None.

    Args:
        folder: the checkpoint.
        reads_all: hash all files; otherwise sizes alone are compared.
    """
    try:
        files = _files_of(_manifest_of(folder))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if reads_all and _sha256(path) != sha256:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _manifest_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _refuse_other_format(folder: Path) -> None:
    manifest = _manifest_of(folder)
    if manifest["format"] != FORMAT:
        raise ResumeError(
            f"{folder}: was written by DTEFrame {manifest['dteframe']!r} in format {manifest['format']!r}; "
            f"this version reads format {FORMAT!r}; resume with that version, or give another name=..."
        )


def _files_of(manifest: Any) -> Mapping[str, tuple[int, str]]:
    """Give size and hash by name."""
    found = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    if not found or not {"format", "dteframe"} <= manifest.keys():
        raise ValueError("it names no files or no format")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
