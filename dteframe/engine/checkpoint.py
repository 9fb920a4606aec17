"""Checkpoints: everything that a run needs to go on, in a folder that is either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dteframe.contracts import Component
from dteframe.engine import calls
from dteframe.engine.progress import Progress
from dteframe.engine.setup import Setup
from dteframe.engine.shared_state import Load, Save, shared_components
from dteframe.engine.state_files import read_state, write_state
from dteframe.errors import ResumeError

MANIFEST = "manifest.json"


def save_checkpoint(setup: Setup, progress: Progress) -> Path:
    """Write ``checkpoints/step_000040``: into a folder beside it first, then renamed."""
    folder = setup.context.run_folder / "checkpoints" / f"step_{progress.step:06d}"
    fresh = folder.with_name(f".{folder.name}.writing")
    for unfinished in folder.parent.glob(".step_*.writing"):
        shutil.rmtree(unfinished, ignore_errors=True)
    fresh.mkdir(parents=True)
    setup.together(Save(fresh))
    write_state(fresh, "components", _component_states(setup))
    state = {
        "pool": setup.pool.fingerprint(),
        "progress": progress.state_dict(),
        "meter": setup.meter.state_dict(),
    }
    write_state(fresh, "progress", state)
    files = sorted(path for path in fresh.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(fresh)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*fresh.rglob("*"), fresh]:
        _to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    _to_disk(folder.parent)
    _to_disk(setup.context.run_folder)
    return folder


def newest_checkpoint(run_folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest whole checkpoint, or None if there is none at all; damaged ones are passed over.

    Raises:
        ResumeError: there are checkpoints, but every one is damaged.
    """
    folders = sorted((run_folder / "checkpoints").glob("step_*"), reverse=True)
    damages: list[str] = []
    for folder in folders:
        damage = _damage(folder)
        if damage is None:
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


def load_checkpoint(setup: Setup, progress: Progress, folder: Path) -> None:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        ResumeError: the questions, or the weights below a LoRA adapter, are others than the checkpoint's.
    """
    state = read_state(folder, "progress")
    if state["pool"] != setup.pool.fingerprint():
        raise ResumeError(
            f"{folder}: the questions of dataset {setup.recipe.dataset.type!r} have changed since then "
            f"(now {len(setup.pool.train)} to train on, {len(setup.pool.evaluation)} held out); "
            "bring the data back, or give another name=... to start afresh"
        )
    states = read_state(folder, "components")
    shared = shared_components(setup.parts)
    setup.together(Load(folder, {name: states[name] for name in shared}))
    for name, component in _stateful(setup).items():
        if name in shared or (name not in states and component.kind == "tracker"):
            continue  # A tracker that was added since then begins with the next step.
        with calls.running(component):
            component.load_state_dict(states[name])
    progress.load_state_dict(state["progress"])
    setup.meter.load_state_dict(state["meter"])


def _stateful(setup: Setup) -> Mapping[str, Component]:
    parts = setup.parts
    named: dict[str, Component] = {
        "estimator": parts.estimator,
        "selector": parts.selector,
        "replay": parts.replay,
    }
    named |= shared_components(parts)
    return named | {f"tracker.{tracker.config.type}": tracker for tracker in parts.trackers}


def _component_states(setup: Setup) -> dict[str, Any]:
    states = {}
    for name, component in _stateful(setup).items():
        with calls.running(component):
            states[name] = component.state_dict()
    return states


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes where {expected['bytes']} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
    return None


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
