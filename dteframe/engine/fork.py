"""Branch a run off another: its newest whole checkpoint and what it recorded, under a new name and recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from dteframe.engine.checkpoint_folder import BEST, CHECKPOINTS, newest_checkpoint, written_whole
from dteframe.engine.run_folder import (
    MANIFEST,
    NOT_FORKED,
    RECIPE,
    differences_from,
    has_begun,
    is_below,
    locked,
    read_manifest,
)
from dteframe.errors import ResumeError
from dteframe.recipe import Recipe
from dteframe.trackers.jsonl import FILE_NAMES

RECORDS = (*FILE_NAMES, "tensorboard")
"""What is carried over; resuming cuts it back to the checkpoint."""


def fork_run(source: Path, folder: Path, recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Make a run folder that can be resumed with ``recipe`` where another run has its newest checkpoint.

    Args:
        source: the folder of the run to branch off; it is left as it is.
        folder: the new one.
        recipe: what is to be done from there on.
        warn: told of damaged checkpoints.

    Raises:
        ResumeError: there is nothing to branch off, the new folder is taken, or the recipe changes what a
            checkpoint holds.
    """
    if not has_begun(source):
        raise ResumeError(f"{source}: holds no run to branch off; give the recipe of a run, and its --runs")
    if folder.exists() and any(folder.iterdir()):
        raise ResumeError(
            f"{folder}: exists; go on with it by name={folder.name} --resume, or give another --fork"
        )
    with locked(source):
        differences = differences_from(source / RECIPE, recipe)
        refused = [text for key, text in differences if is_below(key, NOT_FORKED)]
        if refused:
            raise ResumeError(
                f"{source}: its checkpoints hold this model and these questions, which a fork cannot change; "
                f"start afresh from the policy instead (model.path={source / 'policy'}). What differs:\n"
                + "\n".join(refused)
            )
        checkpoint = newest_checkpoint(source, warn)
        if checkpoint is None:
            raise ResumeError(f"{source}: has no checkpoint yet; wait for one, or start afresh")
        manifest = read_manifest(source)
        manifest["forked_from"] = {
            "run": str(source),
            "checkpoint": checkpoint.name,
            "differences": [text.strip() for _, text in differences],
        }
        with written_whole(folder) as fresh:
            for name in RECORDS:
                _copy(source / name, fresh / name)
            for name in {checkpoint.name, BEST, _best_of(source)}:
                _copy(source / CHECKPOINTS / name, fresh / CHECKPOINTS / name)
            (fresh / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _best_of(source: Path) -> str:
    """Name the best checkpoint, or the file that would say so."""
    path = source / CHECKPOINTS / BEST
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return BEST


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(source, target)
