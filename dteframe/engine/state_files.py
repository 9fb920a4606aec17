"""State as two files: a JSON tree and the arrays that it names, in safetensors. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ARRAY, TENSOR = "__array__", "__tensor__"


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write ``name.json`` and ``name.safetensors``; tensors and arrays come back as what they were.

    Raises:
        TypeError: a value is neither a JSON value nor an array; names its path.
    """
    arrays: dict[str, torch.Tensor] = {}
    tree = _to_json(state, name, arrays)
    (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    save_file(arrays, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what ``write_state`` wrote, bit for bit."""
    tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    state = _from_json(tree, load_file(folder / f"{name}.safetensors"))
    assert isinstance(state, dict)
    return state


def _to_json(value: object, path: str, arrays: dict[str, torch.Tensor]) -> object:
    if isinstance(value, torch.Tensor):
        return {TENSOR: _keep(value.detach().cpu().contiguous().clone(), path, arrays)}
    if isinstance(value, np.ndarray):
        return {ARRAY: _keep(torch.from_numpy(np.array(value, order="C")), path, arrays)}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{path}: key {wrong[0]!r} is no text; a state has text keys")
        return {key: _to_json(item, f"{path}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Sequence):
        return [_to_json(item, f"{path}.{place}", arrays) for place, item in enumerate(value)]
    raise TypeError(f"{path}: {type(value).__name__} cannot be kept; a state holds JSON values and arrays")


def _keep(tensor: torch.Tensor, path: str, arrays: dict[str, torch.Tensor]) -> str:
    """Put a tensor under its path; keys may hold dots, so two paths may read the same."""
    while path in arrays:
        path += "'"
    arrays[path] = tensor
    return path


def _from_json(value: object, arrays: Mapping[str, torch.Tensor]) -> object:
    if isinstance(value, dict):
        if list(value) == [TENSOR]:
            return arrays[value[TENSOR]]
        if list(value) == [ARRAY]:
            return arrays[value[ARRAY]].numpy()
        return {key: _from_json(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item, arrays) for item in value]
    return value
