"""Matrices as long as the pool: in unnamed files that are mapped into memory, gone when the process ends.

The kernel writes pages out when memory is short, so a pool may be larger than what is free.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dteframe import DataError


def scratch_matrix(folder: Path, num_rows: int, width: int) -> Float[np.ndarray, "rows width"]:
    """Make a float32 matrix of zeros in a file of that folder, without a name.

    Raises:
        DataError: there is no room for it; the space is taken here, so that no later write can fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            np.zeros((num_rows, width), np.float32).tofile(file)
            file.flush()
        except OSError as error:
            size = f"{num_rows * width * 4 / 2**20:.0f} MiB"
            raise DataError(
                f"{folder}: no room for the {size} of {num_rows} embeddings of width {width} ({error}); free "
                "some space, or set DTEFRAME_CACHE to a folder on another disk"
            ) from error
        return np.memmap(file, np.float32, "r+", shape=(num_rows, width))
