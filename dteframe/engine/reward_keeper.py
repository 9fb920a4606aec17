"""Keep one reward worker: start it, and leave no process of it behind when it ends or the run does.

Run as a script, in a process of its own: code that a model wrote may fork, hang or crash, so nothing can be
asked of the process that runs it. This one runs no such code and imports nothing that starts threads. Orphans
of the worker become its children, so that none gets away. Linux alone.
"""

import ctypes
import os
import select
import signal
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MILLISECONDS_BETWEEN_BURIALS = 1000
SECONDS_BETWEEN_KILLS = 0.001


def keep(control: int, channel: int, command: list[str]) -> int:
    """Run a command until it or the run ends, then kill whatever it left.

    Args:
        control: file descriptor that ends when the run closes its other end, or dies.
        channel: file descriptor that the command takes over.
        command: the worker's program and arguments.

    Returns:
        The worker's exit status, or 128 and the number of the signal that ended it, as in a shell.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _leave)
    # Where a fork of the run holds the other end too, the end of the run would not be noticed.
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.close(control)
        os.execv(command[0], command)
    os.close(channel)
    try:
        return _watch(control, worker)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all_children()


def _watch(control: int, worker: int) -> int:
    """Wait until the worker or the run has ended; bury orphans meanwhile."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(os.pidfd_open(worker), select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poller.poll(MILLISECONDS_BETWEEN_BURIALS)]
        while (ended := _bury()) is not None:
            if ended[0] == worker:
                status = os.waitstatus_to_exitcode(ended[1])
                return status if status >= 0 else 128 - status
        if control in ready:
            return 0


def _bury() -> tuple[int, int] | None:
    """Collect a child that has ended, if there is one: its number and wait status."""
    try:
        ended = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return ended if ended[0] else None


def _kill_all_children() -> None:
    """Kill until there is no child: those of a killed one become children of this process."""
    while children := children_of(os.getpid()):
        for child in children:
            os.kill(child, signal.SIGKILL)
        while _bury() is not None:
            pass
        time.sleep(SECONDS_BETWEEN_KILLS)


def children_of(process: int) -> list[int]:
    """List the children of a process, those of all its threads, ended ones that nobody has collected too."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                found += [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):  # The process, or a thread of it, has just ended.
        return found
    return found


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
