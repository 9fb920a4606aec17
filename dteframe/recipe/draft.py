"""A recipe before it is checked: the file's values with the overrides laid over, and where each came from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dteframe.contracts import KINDS
from dteframe.errors import Problem
from dteframe.recipe.document import Document, KeyPath, dotted, flatten, read_document
from dteframe.recipe.schema import DEFAULT_SECTIONS, LIST_KINDS


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something was said; sorts as people read: the file from the top, then the overrides."""

    order: tuple[int, int, int]
    text: str

    @property
    def is_override(self) -> bool:
        """Whether the command line said it."""
        return self.order[0] == 1


@dataclass(slots=True)
class Draft:
    """Plain values, a place for every key and value, and the problems found so far."""

    values: dict[str, Any]
    file: str
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[tuple[Place, Problem]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unreadable_places: set[Place] = field(default_factory=set)
    """Where a value stands for one that could not be read; its problem is known."""
    is_readable: bool = True
    """False when there are no values to check."""

    def report(self, path: KeyPath, what: str, about_key: bool = False) -> None:
        """Note a problem of the value at ``path``, or of its key."""
        self.report_at(self.place_of(path, about_key), path, what)

    def report_at(self, place: Place, path: KeyPath, what: str) -> None:
        """Note a problem of the key ``path`` caused at ``place``, unless YAML was already at fault there."""
        if place in self.unreadable_places:
            return
        self.problems.append((place, Problem(place.text, dotted(path), what)))

    def place_of(self, path: KeyPath, about_key: bool = False) -> Place:
        """Find where a value, or its key, was given; of what was left out, the section that lacks it."""
        first, second = (self.keys, self.places) if about_key else (self.places, self.keys)
        for end in range(len(path), 0, -1):
            part = path[:end]
            found = first.get(part) or second.get(part) if end == len(path) else self.keys.get(part)
            if found is not None:
                return found
        return Place((0, 1, 1), f"{self.file}:1:1")

    def typed_paths(self) -> list[KeyPath]:
        """List what may have a type: plugins, ``("model",)`` or ``("tracker", 0)``, and sections in them."""
        found: list[KeyPath] = []
        for kind in KINDS:
            value = self.values.get(kind)
            if kind in LIST_KINDS and isinstance(value, list):
                found.extend((kind, index) for index in range(len(value)))
            elif kind in self.values:
                found.append((kind,))
        for path in list(found):
            section = self.at(path)
            if isinstance(section, Mapping):
                found.extend((*path, key) for key, value in section.items() if isinstance(value, Mapping))
        return found

    def at(self, path: KeyPath) -> Any:
        """Give the value at a path that exists."""
        value: Any = self.values
        for part in path:
            value = value[part]
        return value

    def has(self, path: KeyPath) -> bool:
        """Whether there is a value at a path whose section exists."""
        section = self.at(path[:-1])
        return path[-1] in section if isinstance(section, Mapping) else True

    def type_of(self, path: KeyPath) -> str | None:
        """Give the plugin that a section names, if it is a section that names one."""
        section = self.at(path)
        name = section.get("type") if isinstance(section, Mapping) else None
        return name if isinstance(name, str) else None


def read_draft(file: str, data: bytes) -> Draft:
    """Read the recipe's file."""
    document = _document(data)
    draft = Draft({}, file)
    draft.keys = {path: _in_file(file, mark.line, mark.column) for path, mark in document.keys.items()}
    draft.places = {path: _in_file(file, mark.line, mark.column) for path, mark in document.values.items()}
    for mark, path, what in document.problems:
        draft.report_at(_in_file(file, mark.line, mark.column), path, what)
    draft.unreadable_places = {place for place, _ in draft.problems}
    draft.is_readable = document.is_readable
    if not document.is_readable:
        return draft
    if isinstance(document.value, dict):
        draft.values = copy.deepcopy(document.value)
    elif document.value is None:
        draft.is_readable = False
        draft.report((), "is empty; a recipe needs the keys name, training, model, dataset and reward")
    else:
        draft.is_readable = False
        draft.report((), f"a recipe is a mapping (`key: value` lines), not {_kind_of(document.value)}")
    return draft


@functools.lru_cache(maxsize=1)
def _document(data: bytes) -> Document:
    """Read a text that nobody changes: all runs of a sweep read the same one, for most of their time."""
    return read_document(data)


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Lay ``key.sub=value`` arguments over the file's values, in their order."""
    for number, text in enumerate(overrides):
        place = Place((1, number, 0), f"--set {text}")
        what = _apply(draft, text, place)
        if what is not None:
            key = text.partition("=")[0].strip()
            draft.problems.append((place, Problem(place.text, key if "=" in text else "", what)))


def _apply(draft: Draft, text: str, place: Place) -> str | None:
    """Lay one override over; give what is wrong with it, if anything."""
    key, equals, written = text.partition("=")
    if not equals:
        return "is no override; write key=value, such as training.max_steps=10"
    parts = key.strip().split(".")
    if not all(parts):
        return "is no key; write the keys from the top with dots between them, such as training.max_steps"
    if not written.strip():
        return "has no value after '='; write '' for empty text, or null"
    document = read_document(written)
    if document.problems:
        return "; ".join(what for _, _, what in document.problems)
    return _put(draft, parts, document, place)


def _put(draft: Draft, parts: Sequence[str], document: Document, place: Place) -> str | None:
    """Walk to the key, making sections on the way, and put the value there."""
    top = parts[0]
    if len(parts) > 1 and top not in draft.values and top in DEFAULT_SECTIONS:
        draft.values[top] = copy.deepcopy(DEFAULT_SECTIONS[top])
        draft.keys[top,] = place
    holder: Any = draft.values
    path: KeyPath = ()
    for index, part in enumerate(parts):
        if len(path) == 1 and path[0] in LIST_KINDS and isinstance(holder, dict) and part.isdigit():
            holder = _as_list(draft, str(path[0]))
        step = _step(holder, part, path)
        if isinstance(step, _Refusal):
            return step.what
        path = (*path, step)
        if index == len(parts) - 1:
            break
        if isinstance(holder, list) and step == len(holder):
            return (
                f"{dotted(path[:-1])} has only {len(holder)} entries; give the whole new entry: {{type: ...}}"
            )
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
            draft.keys[path] = place
        holder = holder[step]
    _forget(draft, path)
    if isinstance(holder, list) and path[-1] == len(holder):
        holder.append(document.value)
    else:
        holder[path[-1]] = document.value
    for below, _ in flatten(document.value, path):
        draft.keys[below] = draft.places[below] = place
    return None


def _as_list(draft: Draft, kind: str) -> list[Any]:
    """Write the only reward, or tracker, as a list of one: an override counts its entries."""
    for table in (draft.keys, draft.places):
        moved = {(kind, 0, *path[1:]): place for path, place in table.items() if path[:1] == (kind,)}
        table.update(moved)
    draft.values[kind] = [draft.values[kind]]
    found: list[Any] = draft.values[kind]
    return found


@dataclass(frozen=True, slots=True)
class _Refusal:
    what: str


def _step(holder: Any, part: str, path: KeyPath) -> str | int | _Refusal:
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        return _Refusal(f"{dotted(path)} is {holder!r}, which has no keys inside")
    if not (part.isascii() and part.isdigit()):
        first = dotted((*path, 0, part))
        return _Refusal(f"{dotted(path)} is a list; count its entries from 0, such as {first}")
    if len(part) > 9 or int(part) > len(holder):
        return _Refusal(f"{dotted(path)} has {len(holder)} entries, counted from 0; {part} is beyond them")
    return int(part)


def _forget(draft: Draft, path: KeyPath) -> None:
    for table in (draft.keys, draft.places):
        for old in [one for one in table if one[: len(path)] == path]:
            del table[old]


def _in_file(file: str, line: int, column: int) -> Place:
    return Place((0, line, column), f"{file}:{line}:{column}")


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else repr(value)
