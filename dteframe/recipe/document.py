"""Read YAML text as plain values, and remember where each key and value stands.

Scalars are those of the YAML 1.2 core schema (``1e-3`` is a number, ``on`` a string). Tags, merge keys,
duplicate keys, keys that are no text, and more than one document are refused; anchors and aliases are fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Where a value is: keys and list indices from the top."""

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 20_000
"""Values after aliases are written out: more is an accident, or a bomb."""

SCALARS = {
    "tag:yaml.org,2002:null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "tag:yaml.org,2002:bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "tag:yaml.org,2002:int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""The YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), in the order of trying."""


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in the text, both counted from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """What a text says, and where."""

    value: Any = None
    """None, bool, int, float, str, list, or dict with str keys."""
    keys: dict[KeyPath, Mark] = field(default_factory=dict)
    """Where the key of a value stands; of an item of a list, where the item begins."""
    values: dict[KeyPath, Mark] = field(default_factory=dict)
    """Where a value begins."""
    problems: list[tuple[Mark, KeyPath, str]] = field(default_factory=list)
    """What is wrong: place, dotted key, what. What is not wrong is in ``value`` all the same."""
    is_readable: bool = True
    """False when the text breaks off at a problem, so that ``value`` says nothing."""


def read_document(data: bytes | str) -> Document:
    """Read YAML; never raises, whatever the text."""
    document = Document()
    try:
        if len(data) > MAX_BYTES:
            raise _Unreadable(
                Mark(1, 1), f"has {len(data)} bytes, a recipe at most {MAX_BYTES}; is this the right file?"
            )
        text = data if isinstance(data, str) else _decode(data)
        node = _compose(text, document)
        if node is not None:
            document.value = _Writer(document).value_of(node, (), 0)
    except _Unreadable as error:
        document.problems.append((error.mark, (), error.what))
        document.is_readable = False
        document.keys.clear()
        document.values.clear()
    return document


class _Unreadable(Exception):
    def __init__(self, mark: Mark, what: str) -> None:
        self.mark = mark
        self.what = what
        super().__init__(what)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", "replace")
        byte = f"byte 0x{data[error.start]:02x}"
        raise _Unreadable(_mark_at(before, len(before)), f"{byte} is not UTF-8; save it as UTF-8") from error


def _mark_at(text: str, index: int) -> Mark:
    before = text[:index]
    return Mark(before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1)


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1)


class _Composer(yaml.SafeLoader):
    """PyYAML's loader up to the nodes, with the scalars of YAML 1.2; tags and depth are limited."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {  # PyYAML's name
        None: list(SCALARS.items())
    }

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self.document = document
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it open
        if not isinstance(event, yaml.AliasEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            what = f"the tag {tag} is not allowed; write the plain value"
            self.document.problems.append((_mark(event.start_mark), (), what))
            event.tag = None
            if isinstance(event, yaml.ScalarEvent):
                event.implicit = (event.style is None, True)
        if self.depth >= MAX_DEPTH:
            raise _Unreadable(_mark(event.start_mark), f"nested more than {MAX_DEPTH} deep; flatten it")
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, document: Document) -> yaml.Node | None:
    try:
        loader = _Composer(text, document)
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(str(error.character)[0])
        what = f"the character U+{character:04X} is not allowed in YAML; delete it"
        raise _Unreadable(_mark_at(text, error.position), what) from error
    try:
        loader.get_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it open
        if loader.check_event(yaml.StreamEndEvent):
            return None
        node = loader.compose_document()
        if not loader.check_event(yaml.StreamEndEvent):
            event: Any = loader.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it open
            what = "a second document begins here; a recipe is one: delete the '---'"
            raise _Unreadable(_mark(event.start_mark), what)
        return node
    except yaml.MarkedYAMLError as error:
        what, begins = _syntax(error)
        mark = error.context_mark if begins else error.problem_mark
        raise _Unreadable(_mark(mark or error.problem_mark), what) from error
    except (
        ValueError,
        OverflowError,
    ) as error:  # PyYAML passes on what chr() says to an escape such as "\\U99999999"
        what = "a backslash in double quotes begins an escape, and this one is no character; use '...'"
        raise _Unreadable(_mark(loader.get_mark()), what) from error
    finally:
        loader.dispose()


class _Writer:
    """Turn nodes into values, writing aliases out; notes marks and problems in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.num_values = 0
        self.open_nodes: set[int] = set()

    def value_of(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        mark = _mark(node.start_mark)
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            what = f"more than {MAX_VALUES} values once aliases are written out; a recipe needs far fewer"
            raise _Unreadable(mark, what)
        if id(node) in self.open_nodes:
            raise _Unreadable(mark, "the value contains an alias (*) of itself; write it out")
        if depth > MAX_DEPTH:
            raise _Unreadable(mark, f"nested more than {MAX_DEPTH} deep; flatten it")
        self.document.values[path] = mark
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path, depth)
            if isinstance(node, yaml.SequenceNode):
                for index, item in enumerate(node.value):
                    self.document.keys[*path, index] = _mark(item.start_mark)
                return [
                    self.value_of(item, (*path, index), depth + 1) for index, item in enumerate(node.value)
                ]
            return self._scalar(node, path)
        finally:
            self.open_nodes.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node.start_mark)
            problem = self._key_problem(key_node, path, found)
            if problem is not None:
                self.document.problems.append((mark, path, problem))
                continue
            key = key_node.value
            self.document.keys[*path, key] = mark
            found[key] = self.value_of(value_node, (*path, key), depth + 1)
        return found

    def _key_problem(self, node: yaml.Node, path: KeyPath, found: dict[str, Any]) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            return "a key must be text, not a list or a mapping; put it in quotes"
        if node.value == "<<" and node.style is None:
            return (
                "merge keys (<<) are no part of YAML 1.2 and hide where a value is from; write the keys out, "
                "or give a whole section by an alias (key: *name)"
            )
        if node.tag != "tag:yaml.org,2002:str":
            shown = node.value or "nothing"
            return f"a key must be text, not {shown}; put it in quotes"
        if _has_surrogate(node.value):
            return f"the key {ascii(node.value)} holds half of a surrogate pair; write the character itself"
        if node.value in found:
            first = self.document.keys[*path, node.value]
            return (
                f"the key {node.value!r} is given twice, first in line {first.line}, column {first.column}; "
                "delete one of the two"
            )
        return None

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text = node.value
        kind = node.tag.rpartition(":")[2]
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            if len(text) > 300:
                self._note(node, path, f"a number of {len(text)} digits is too long")
                return 0
            return int(text, base)
        if kind == "float":
            return self._float(node, path)
        if _has_surrogate(text):
            self._note(
                node, path, f"{ascii(text)} holds half of a surrogate pair; write the character itself"
            )
            return text.encode("utf-8", "replace").decode()
        return text

    def _float(self, node: yaml.Node, path: KeyPath) -> float:
        text = node.value.lower()
        if text.endswith(".nan"):
            self._note(node, path, ".nan is no number that an option can have")
            return 0.0
        if text.endswith(".inf"):
            return float(text.replace(".inf", "inf"))
        number = float(text)
        if number in (float("inf"), float("-inf")):
            self._note(node, path, f"{node.value} is too large a number; write .inf for infinity")
        return number

    def _note(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        self.document.problems.append((_mark(node.start_mark), path, what))


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, bool]:
    """Say what PyYAML found, with what usually is behind it; and whether to point at the beginning of it."""
    found = error.problem or error.context or ""
    for part, words in _SYNTAX:
        if part in found:
            return words, False
    for part, words in _UNCLOSED:
        if part in found:
            return words, True
    return f"not YAML: {found}", False


_SYNTAX = (
    ("'\\t'", "a tab where YAML wants spaces; indent with spaces"),
    (
        "mapping values are not allowed",
        "a ': ' that YAML does not expect here; put text with a colon in quotes, or check the indentation",
    ),
    ("could not find expected ':'", "a key without ': '; write `key: value`"),
    (
        "expected <block end>",
        "does not belong to what is above; check the indentation, and brackets or quotes that end early",
    ),
    ("expected the node content", "a value is missing before this; put it in quotes if it is text"),
    (
        "found undefined alias",
        "an alias (*) of a name that no anchor (&) gives; put text that begins with '*' in quotes",
    ),
    ("found duplicate anchor", "an anchor (&) of this name exists already; give it another name"),
    ("found unknown escape character", "a backslash in double quotes begins an escape; use '...'"),
    ("sequence entries are not allowed", "a '- ' that YAML does not expect here; give it a line of its own"),
    ("that cannot start any token", "this character cannot begin a value; put the text in quotes"),
    ("expected alphabetic or numeric character", "'&', '*' or '!' without a name; put the text in quotes"),
)
"""Part of PyYAML's message, and what to tell instead."""
_UNCLOSED = (
    ("expected ',' or '}'", "this '{' is not closed, or a ',' is missing in it"),
    ("expected ',' or ']'", "this '[' is not closed, or a ',' is missing in it"),
    ("found unexpected end of stream", "this quote is not closed"),
    ("found unexpected document separator", "this quote is not closed before '---' or '...'"),
)
"""The same, where the place to point at is the beginning."""


def flatten(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Give every value below ``path`` with its own path, from the top."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from flatten(item, (*path, index))


def dotted(path: KeyPath) -> str:
    """Write a path as people do: ``reward.0.weight``."""
    return ".".join(str(part) for part in path)
