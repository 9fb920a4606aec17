"""Write reasoning-gym's entries as JSON values and read them back as they were, and build its tasks.

An entry is what a task scores an answer with. Plain JSON would turn its tuples into lists and its integer
keys into text, and some tasks (arc_agi, rearc) then score their own answers near 0.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dteframe import DataError
from dteframe.records import JsonValue

if TYPE_CHECKING:
    from reasoning_gym.factory import ProceduralDataset


def to_json(value: Any) -> JsonValue:
    """Write a value so that ``from_json`` gives an equal one of the same type.

    What JSON lacks becomes an object whose only key begins with @: ``{"@tuple": [1, 2]}``.

    Raises:
        TypeError: it holds something else than JSON values, tuples, sets, fractions and mappings.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, tuple):
        return {"@tuple": [to_json(part) for part in value]}
    if isinstance(value, set | frozenset):
        return {"@set": [to_json(part) for part in sorted(value)]}
    if isinstance(value, Fraction):
        return {"@fraction": [value.numerator, value.denominator]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("@") for key in value):
            return {key: to_json(part) for key, part in value.items()}
        return {"@pairs": [[to_json(key), to_json(part)] for key, part in value.items()]}
    raise TypeError(f"reasoning-gym entry: {type(value).__name__} cannot be written as JSON")


def from_json(value: Any) -> Any:
    """Read what ``to_json`` wrote."""
    if isinstance(value, list | tuple):
        return [from_json(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        ((key, parts),) = value.items()
        if key == "@tuple":
            return tuple(from_json(part) for part in parts)
        if key == "@set":
            return {from_json(part) for part in parts}
        if key == "@fraction":
            return Fraction(*parts)
        if key == "@pairs":
            return {from_json(name): from_json(part) for name, part in parts}
    return {key: from_json(part) for key, part in value.items()}


def make_task(name: str, options: Mapping[str, Any], seed: int, size: int) -> ProceduralDataset:
    """Build a task of reasoning-gym.

    Raises:
        DataError: the package is missing, the task or an option is unknown, or the task refuses an option.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise DataError("reasoning_gym: is not installed; pip install 'dteframe[gym]'") from error
    where = f"reasoning_gym task {name!r}"
    if name not in DATASETS:
        raise DataError(f"{where}: is unknown{nearest(name, list(DATASETS))}")
    fields = {field.name: field for field in dataclasses.fields(DATASETS[name][1])}
    known = sorted(set(fields) - {"seed", "size"})
    for option in options:
        if option not in known:
            raise DataError(f"{where}: option {option!r} is unknown{nearest(option, known)}")
    try:
        return create_dataset(name, **dict(options), seed=seed, size=size)
    except (AssertionError, TypeError, ValueError) as error:  # The tasks check their options with assert.
        raise DataError(f"{where}: cannot be made with {json.dumps(dict(options))}: {error}") from error


def nearest(name: str, known: list[str]) -> str:
    """Give the end of a message about an unknown name: the nearest spelling, or what there is."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(sorted(known)) or 'none'}"
