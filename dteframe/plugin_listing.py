"""List plugins and describe their options as their users see them: what ``dteframe plugins`` prints."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dteframe.contracts import KINDS
from dteframe.registry import Registry

_WORDS: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    Any: "anything",
}
_BOUNDS: Mapping[str, str] = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a plugin's section in a recipe."""

    name: str
    """Dotted below the section, such as ``warm_up.steps``."""
    only_with: str | None
    """The choice that brings it: ``embeddings.type=lm``; None for an option that is always there."""
    type: str
    """In words, with its bounds: ``integer, at least 1``."""
    default: str | None
    """As JSON; None where the recipe must give a value."""
    description: str
    """The docstring below the option, on one line."""


@dataclass(frozen=True, slots=True)
class ListedPlugin:
    """A plugin that recipes can name."""

    kind: str
    name: str
    summary: str
    origin: str
    """``built-in``, the distribution and its entry point, or the file."""
    sha256: str | None
    """Hash of its source."""
    description: str
    """The rest of the class's docstring, sources among it."""
    options: list[Option]


def list_plugins(registry: Registry, kind: str | None, name: str | None) -> list[ListedPlugin]:
    """List the plugins of all kinds, of one, or one alone.

    Raises:
        PluginError: there is no such kind or plugin; names the nearest.
    """
    if kind is not None and name is not None:
        found = [registry.get(kind, name)]
    else:
        found = [item for one in ([kind] if kind else KINDS) for item in registry.of_kind(one)]
    return [
        ListedPlugin(
            kind=item.kind,
            name=item.name,
            summary=item.summary,
            origin=item.origin.label,
            sha256=item.origin.sha256,
            description=inspect.cleandoc(item.component.__doc__ or "").partition("\n")[2].strip(),
            options=options_of(item.config),
        )
        for item in found
    ]


def listing_text(plugins: Sequence[ListedPlugin]) -> str:
    """Word a list: a line per plugin, by kind, each kind with the question that it answers."""
    width = max((len(item.name) for item in plugins), default=0)
    origin_width = max((len(item.origin) for item in plugins), default=0)
    lines = []
    for kind in dict.fromkeys(item.kind for item in plugins):
        lines.append(f"{kind}: {inspect.cleandoc(KINDS[kind].__doc__ or '').splitlines()[0]}")
        lines += [
            f"  {item.name:<{width}}  {item.origin:<{origin_width}}  {item.summary}"
            for item in plugins
            if item.kind == kind
        ]
    return "\n".join(lines)


def description_text(item: ListedPlugin) -> str:
    """Word one plugin: what it does, where it is from, every option with type, default and meaning."""
    lines = [f"{item.kind}: {item.name} ({item.origin})", item.summary]
    if item.description:
        lines += ["", item.description]
    lines += ["", "options" if item.options else "no options"]
    for option in item.options:
        default = "required" if option.default is None else f"default {option.default}"
        condition = f" (with {option.only_with})" if option.only_with else ""
        lines += [f"  {option.name}{condition}: {option.type}; {default}", f"      {option.description}"]
    return "\n".join(lines)


def options_of(config: type[BaseModel], prefix: str = "", only_with: str | None = None) -> list[Option]:
    """List the options of a configuration, ``type`` left out, those of nested ones after their own."""
    found = []
    for name, item in config.model_fields.items():
        if name != "type":
            description = " ".join((item.description or "").split())
            found.append(Option(prefix + name, only_with, _type_in_words(item), _default(item), description))
            for inner in _nested(item.annotation):
                chosen = _type_of(inner)
                choice = f"{prefix}{name}.type={chosen}" if chosen else only_with
                found += options_of(inner, f"{prefix}{name}.", choice)
    return found


def _type_of(config: type[BaseModel]) -> str | None:
    """Give the ``type`` that chooses this configuration among others, if it has one."""
    field = config.model_fields.get("type")
    return None if field is None else str(field.default)


def _nested(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _nested(inner)


def _type_in_words(item: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(bound, name)}"
        for bound in item.metadata
        for name, words in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join([_in_words(item.annotation), *bounds])


def _in_words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in (None, type(None)):
        return "null"
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin is Annotated:
        return _in_words(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(one) for one in inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {_in_words(inner[0])} to {_in_words(inner[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {_in_words(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        chosen = _type_of(annotation)
        return f"{{type: {chosen}}}" if chosen else "options"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(item: FieldInfo) -> str | None:
    value = item.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
