"""What became of mutated files, and how it is told."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SECONDS_AT_MOST = 2.0
"""Of CPU time: others may be at work on the machine."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutated file."""

    kind: str
    """``plan`` or ``read``, ``refused``, or ``surprise``."""
    seconds: float
    message: str = ""


def verdict(kind: str, seconds: float, message: str) -> Verdict:
    """Judge a file; what took too long is a surprise, whatever else became of it."""
    if seconds > SECONDS_AT_MOST:
        return Verdict("surprise", seconds, f"took {seconds:.1f} seconds ({kind})")
    return Verdict(kind, seconds, message)


def judge_many(
    about: str, what: str, count: int, verdicts: Callable[[range], Iterator[tuple[int, str, Verdict]]]
) -> None:
    """Judge as many files as the command line asks for, and print the counts and every surprise.

    Args:
        about: what the script does.
        what: the files are.
        count: of files where the command line gives none.
        verdicts: gives each seed with where its file is, and what became of it.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    arguments = parser.parse_args()
    counts, slowest = Counter[str](), 0.0
    for seed, where, found in verdicts(range(arguments.first, arguments.first + arguments.count)):
        counts[found.kind] += 1
        slowest = max(slowest, found.seconds)
        if found.kind == "surprise":
            sys.stdout.write(f"seed {seed}: {where}\n{found.message[-1500:]}\n")
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    sys.stdout.write(f"{arguments.count} mutated {what}: {kinds}; the slowest took {slowest:.2f} seconds\n")
    sys.exit(counts["surprise"] > 0)
