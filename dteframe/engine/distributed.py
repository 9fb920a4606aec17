"""The processes of a run: started by torchrun, they talk through torch.distributed; alone, nothing is sent.

Process 0 is the main one. Messages between processes are pickles of our own records, as torch.distributed
sends objects; nothing that was pickled is ever kept.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dteframe.errors import DataError, SilentError

Value = TypeVar("Value")

FAILURE = "dteframe_first_failure"
"""Key of the processes' common store under which the first that fails puts its number."""
LONGEST_WAIT = timedelta(days=2)
"""How long processes wait for one another: the others wait while the main one downloads, warms up or plans.
That one has died is noticed by the launcher, at once and not by waiting."""
SECONDS_FOR_THE_LAUNCHER = 30.0
"""How long a process that has lost another leaves the word to whoever knows why."""


class AnotherProcessFailedError(SilentError):
    """This process ends because another did, whose error people read."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Which process of how many this is, and how it talks to the others: every method is called by all."""

    rank: int = 0
    """0 for the main process."""
    count: int = 1
    store: Store | None = None
    """What survives a process that dies; None for a process alone, which has no process group."""

    @property
    def is_main(self) -> bool:
        """Whether this process leads, writes the run folder and talks to people."""
        return self.rank == 0

    @property
    def are_sharded(self) -> bool:
        """Whether there is a process group, over which the module is sharded."""
        return self.store is not None

    def broadcast(self, value: Value) -> Value:
        """Give everybody the main process's value."""
        if not self.are_sharded:
            return value
        boxed = [value]
        dist.broadcast_object_list(boxed, src=0)
        return boxed[0]

    def collect(self, value: Value) -> list[Value]:
        """Give the main process everybody's values, by rank, and the others none."""
        if not self.are_sharded:
            return [value]
        values: list[Value | None] | None = [None] * self.count if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []  # type: ignore[return-value]  # all places are filled now

    def exchange(self, value: Value) -> list[Value]:
        """Give everybody everybody's values, by rank."""
        if not self.are_sharded:
            return [value]
        values: list[Value | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # all places are filled now

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Add everybody's tensors of equal shape."""
        if self.are_sharded:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until all are here."""
        if self.are_sharded:
            dist.barrier()

    def may_speak(self, error: BaseException) -> bool:
        """Whether this process is the one whose error people should read: the first that failed.

        A connection that breaks is a consequence: the launcher is given the time to say which process died.
        """
        if self.store is None:
            return True
        try:
            if _is_lost_connection(error):
                _wait_to_be_ended(self.store)
            first: bytes = self.store.compare_set(FAILURE, "", str(self.rank))
        except (KeyboardInterrupt, RuntimeError):  # The launcher ends us, or is itself gone.
            return False
        return first.decode() == str(self.rank)


ALONE = Processes()


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun, give a process alone.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        AnotherProcessFailedError: another process failed first, whose error people read.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    store, rank, count = next(rendezvous("env://", timeout=LONGEST_WAIT))
    processes = Processes(rank, count, PrefixStore("dteframe", store))
    # At the program's end, and after what is made from now on: an engine of vLLM has groups of its own.
    leave = weakref.finalize(Processes, _leave)
    try:
        device = device_of_this_process(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            store=PrefixStore("process_group", store),
            rank=rank,
            world_size=count,
            timeout=LONGEST_WAIT,
            device_id=torch.device(device) if device.startswith("cuda") else None,
        )
        yield processes
    except BaseException as error:
        leave.detach()  # Others are not there any more to take leave of.
        if processes.may_speak(error):
            raise
        raise AnotherProcessFailedError("another process failed") from error


def device_of_this_process(wanted: str) -> str:
    """Choose the device for ``training.device``: under torchrun ``cuda:N``, N counting a machine's processes.

    Raises:
        DataError: a GPU is asked for and there is none, or there are fewer than processes.
    """
    num_gpus = torch.cuda.device_count()
    if wanted == "cuda" and num_gpus == 0:
        raise DataError("training.device: 'cuda' is asked for and torch sees no GPU; use 'auto' or 'cpu'")
    if wanted == "cpu" or num_gpus == 0:
        return "cpu"
    if not dist.is_torchelastic_launched():
        return "cuda"
    number = int(os.environ["LOCAL_RANK"])
    if number >= num_gpus:
        raise DataError(
            f"--processes: {os.environ['LOCAL_WORLD_SIZE']} processes on a machine where torch sees "
            f"{num_gpus} GPUs; start as many as there are GPUs, or set training.device: cpu"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _wait_to_be_ended(store: Store) -> None:
    """Wait until another process has said why it fails, or the launcher ends this one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # It was left to the main process so far.
    deadline = time.monotonic() + SECONDS_FOR_THE_LAUNCHER
    while time.monotonic() < deadline and not store.check([FAILURE]):
        time.sleep(0.1)
