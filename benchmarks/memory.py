"""The memory peak of an update, ours beside TRL's: how far a process's memory rises above its own.

Each side takes a few steps of ``step.py`` in a fresh process of its own. From the moment at which
completions have their rewards to the end of the step, its peak is watched; the last steps have the
optimizer's moments already.

    python benchmarks/memory.py                    # C and E, about 3 minutes
    python benchmarks/memory.py --workload A --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from step import Turns, run_ours, run_trl
from workloads import WORKLOADS, use_one_thread, write

STEPS = 5
WARM_UP_STEPS = 2
SIDES = {"TRL": run_trl, "ours": run_ours}
MIB = 2**20
GIVE_BACK_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For glibc: freed blocks leave the process, so that a peak is what is held and not what was once."""
RESET_PEAK = Path("/proc/self/clear_refs")


class Peaks(Turns):
    """A side by itself, and how far each of its updates rises above what the process held before it."""

    def __init__(self) -> None:
        """Begin without steps."""
        super().__init__()
        self.rises: list[int] = []
        """Bytes."""
        self._held = 0

    def begin(self, side: int) -> None:
        """Wait for nobody."""

    def scored(self, side: int) -> None:
        """Note what is held, and forget earlier peaks."""
        self._held = status_bytes("VmRSS")
        RESET_PEAK.write_text("5")

    def step_ended(self, side: int, is_last: bool) -> None:
        """Note how far the update rose."""
        self.rises.append(status_bytes("VmHWM") - self._held)


def status_bytes(key: str) -> int:
    """Read ``VmRSS`` (held now) or ``VmHWM`` (the most since it was reset)."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key!r}; this benchmark needs Linux")
    return int(found[1]) * 1024


def rises_of(side: str, name: str) -> list[int]:
    """Let a side take its steps in this process; give the bytes by which each update rose."""
    peaks = Peaks()
    with tempfile.TemporaryDirectory() as folder:
        write(WORKLOADS[name], Path(folder))
        SIDES[side](WORKLOADS[name], Path(folder), STEPS, peaks)
    return peaks.rises


def measured(side: str, name: str) -> float:
    """Have a fresh process measure; give the median rise after the warm-up, in bytes."""
    done = subprocess.run(
        [sys.executable, __file__, "--workload", name, "--side", side],
        env={**os.environ, **GIVE_BACK_AT_ONCE},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[WARM_UP_STEPS:])


def main() -> None:
    """Measure both sides of each workload, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: C and E")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process: bytes of each step")
    parser.add_argument("--json", action="store_true", help="ratios as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    names = options.workload or ["C", "E"]
    if options.side:
        import torch

        torch.set_num_threads(1)
        sys.stdout.write(json.dumps(rises_of(options.side, names[0])) + "\n")
        return
    ratios = {}
    sys.stdout.write(f"{'':50}{'TRL MiB':>10}{'ours MiB':>10}{'ratio':>7}\n")
    for name in names:
        trl, ours = measured("TRL", name), measured("ours", name)
        ratios[name] = ours / trl
        told = f"{name} {WORKLOADS[name].description[:47]}"
        sys.stdout.write(f"{told:50}{trl / MIB:10.1f}{ours / MIB:10.1f}{ratios[name]:7.2f}\n")
    if options.json:
        sys.stdout.write(json.dumps(ratios) + "\n")


if __name__ == "__main__":
    main()
