"""Put a disk that takes no more into words, whoever was writing: a tracker, torch, safetensors or we."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dteframe.errors import DTEFrameError

TROUBLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EIO: "see to the disk",
}
"""What to do, by what the system says."""


class DiskError(DTEFrameError):
    """The disk does not take what a run writes."""


@contextmanager
def disk_for(folder: Path) -> Iterator[None]:
    """Turn whatever is raised because a disk takes no more into an error that says so, and what to do.

    Args:
        folder: where the run writes.

    Raises:
        DiskError: instead of what Python, torch or safetensors raise.
    """
    try:
        yield
    except DTEFrameError:
        raise
    except Exception as error:
        number = _trouble(error)
        if number is None:
            raise
        where = getattr(error, "filename", None) or folder
        raise DiskError(f"{where}: cannot be written ({os.strerror(number)}); {TROUBLE[number]}") from error


def _trouble(error: BaseException) -> int | None:
    """Find what the system said: safetensors and torch have it in their text alone."""
    if isinstance(error, OSError):
        return error.errno if error.errno in TROUBLE else None
    text = str(error)
    return next((number for number in TROUBLE if os.strerror(number) in text), None)
