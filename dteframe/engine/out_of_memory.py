"""Put running out of memory into words: in which stage, at what work, and which keys to change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dteframe.contracts import RolloutConfig
from dteframe.engine.micro_batches import MicroBatch
from dteframe.engine.pack import Row
from dteframe.errors import DTEFrameError
from dteframe.memory import in_words
from dteframe.memory_plan import sampling_keys

WORDS_OF_TORCH = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch says, in a plain RuntimeError, where it has no OutOfMemoryError for it."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SMALLER_TRAINING = (
    "set training.gradient_checkpointing",
    "set model.lora",
    "lower rollout.max_completion_length",
)
SMALLER_MODEL = ("set model.dtype to bfloat16", "take a smaller model")
SMALLER_OPTIMIZER = ("set model.lora", *SMALLER_MODEL)
MORE_DEVICES = ("train in more --processes", "set training.cpu_offload")
"""What shards or moves the memory of a GPU; several processes on a CPU share the same memory."""


class NoMemoryError(DTEFrameError):
    """The device has not the memory for a stage."""


@contextmanager
def memory_for(stage: str, work: str, device: str, remedies: Sequence[str]) -> Iterator[None]:
    """Turn running out of memory into an error that says where, and what to do.

    Args:
        stage: the name that the meter has for it.
        work: what was being done, such as ``a micro-batch of 3 rows``.
        device: where.
        remedies: two or more things to change, the best first.

    Raises:
        NoMemoryError: instead of what torch or Python raise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        every = [*remedies, *(MORE_DEVICES if device.startswith("cuda") else ())]
        advice = f"{', '.join(every[:-1])} or {every[-1]}"
        raise NoMemoryError(
            f"{stage}: {device!r} is out of memory at {work}{_asked(error)}; {advice}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell running out of memory from other errors."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS_OF_TORCH)


def work_of(micro_batch: MicroBatch) -> str:
    """Word a micro-batch: how large it is, padding included."""
    num_lines, length = micro_batch.shape
    return f"a micro-batch of {len(micro_batch.rows)} completions, {num_lines * length} tokens"


def remedies_for(rows: Sequence[Row], micro_batch_tokens: int) -> tuple[str, ...]:
    """Say what makes a micro-batch take less; a row of its own cannot be split."""
    if len(rows) < 2:
        return SMALLER_TRAINING
    return (f"lower training.micro_batch_tokens ({micro_batch_tokens!r})", *SMALLER_TRAINING)


def sampling_remedies(rollout: RolloutConfig) -> tuple[str, ...]:
    """Say what makes sampling take less, with the keys that this rollout has."""
    keys = [f"lower rollout.{key} ({getattr(rollout, key)!r})" for key in sampling_keys(rollout)]
    return (*keys, *SMALLER_MODEL)


def _asked(error: BaseException) -> str:
    """Say how much more was asked for, where torch tells."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
    if found is None:
        return ""
    return f", which wanted another {in_words(int(float(found[1]) * UNITS[found[2]]))}"
