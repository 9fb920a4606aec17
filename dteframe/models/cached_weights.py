"""Weights on disk that were costly to make: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHECKSUM = "sha256_of_tensors"


class CorruptCacheError(Exception):
    """A file of cached weights that is not what was written; the message says what is wrong with it."""


def write_weights(path: Path, module: PreTrainedModel, facts: dict[str, str]) -> None:
    """Write the module's parameters and ``facts`` about them to a safetensors file, atomically."""
    from safetensors.torch import save_file

    tensors = _parameters(module)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, unfinished, metadata={**facts, CHECKSUM: _checksum(tensors)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_weights(path: Path, module: PreTrainedModel) -> dict[str, str]:
    """Put the weights of a file into the module.

    Returns:
        The facts that were written with them.

    Raises:
        CorruptCacheError: the file is cut, changed, or not of this module.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as problem:
        raise CorruptCacheError(f"it cannot be read ({problem})") from problem
    if facts.pop(CHECKSUM, None) != _checksum(tensors):
        raise CorruptCacheError("its contents do not have the checksum that was written with them")
    parameters = _parameters(module)
    if {name: item.shape for name, item in tensors.items()} != {
        name: item.shape for name, item in parameters.items()
    }:
        raise CorruptCacheError("its tensors are not those of the model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return facts


def _parameters(module: PreTrainedModel) -> dict[str, Tensor]:
    """Name the parameters, tied ones once, without their gradients."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Hash names, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
