"""Tiny runs in several processes: ``torchrun several_processes.py JOBS`` does those of a JSON file in turn.

Several runs share one start of the processes, because importing torch takes most of the time.
"""

import json
import subprocess
import sys
from pathlib import Path

from tiny_run import TINY

from dteframe.engine.distributed import started
from dteframe.engine.follow import follow_recipe
from dteframe.engine.run import run_recipe
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry


def run_in_processes(count: int, jobs: dict[Path, list[str]], *, resume: bool = False) -> None:
    """Do tiny runs in ``count`` processes: folders, and what their recipes override."""
    for folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny.yaml").write_text(TINY)
    told = json.dumps({str(folder): overrides for folder, overrides in jobs.items()})
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__, told]
    command += ["--resume"] if resume else []
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def _do(jobs: dict[str, list[str]], *, resume: bool) -> None:
    with started("cpu") as processes:
        for folder, overrides in jobs.items():
            recipe, runs = Path(folder) / "tiny.yaml", Path(folder) / "runs"
            registry = load_registry([], near=recipe)
            loaded = load_recipe(recipe, overrides, registry)
            if processes.is_main:
                run_recipe(loaded, registry, runs, resume, processes)
            else:
                follow_recipe(loaded, registry, runs, processes)


if __name__ == "__main__":
    _do(json.loads(sys.argv[1]), resume="--resume" in sys.argv)
