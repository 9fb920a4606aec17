"""Start the processes of a run on this machine: torchrun's own launcher, and its verdict in our words."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as torchrun

from dteframe.errors import DTEFrameError

INTERRUPTED = 130
"""Exit code after control-C, as shells have it."""
LAUNCHER = "torch.distributed.elastic"


class ProcessDiedError(DTEFrameError):
    """A process of the run that ended without a word of its own."""


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``dteframe ARGUMENTS`` in ``count`` processes.

    Returns:
        The exit code: of the first that failed, or after a signal that has ended all; it has said why.

    Raises:
        ProcessDiedError: a process was killed.
    """
    # Processes that share a machine share its cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # Its log repeats, with tracebacks, what the process that failed says in a sentence.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHER)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={count}", "-m", "dteframe", *arguments]
    try:
        torchrun(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise ProcessDiedError(_how_it_died(rank, count, failure)) from error
        return failure.exitcode
    except SignalException:
        return INTERRUPTED
    return 0


def _how_it_died(rank: int, count: int, failure: ProcessFailure) -> str:
    name = signal.Signals(-failure.exitcode).name
    advice = "the same command with --resume goes on from the last checkpoint"
    if name == "SIGKILL":
        advice = f"the system kills what takes too much memory; {advice}"
    return f"--processes {count}: process {rank} (pid {failure.pid}) was ended by {name}; {advice}"
