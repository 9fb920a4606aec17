"""Find the plugins, load them, and know each by kind and name; listing them imports no heavy package.

There is no global registry: every call of ``load_registry`` makes a new one.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, get_args, get_origin

import pluggy
from pydantic_core import PydanticUndefined

from dteframe import hookspecs
from dteframe.contracts import KINDS, Component, PluginConfig
from dteframe.errors import PluginError
from dteframe.plugin_sources import (
    BUILT_IN,
    LocalSource,
    Origin,
    one_line,
    plugin_sources,
    said,
    shown,
)


@dataclass(frozen=True, slots=True)
class Registered:
    """A plugin that recipes can name."""

    kind: str
    name: str
    """What ``type:`` says in recipes."""
    component: type[Component]
    config: type[PluginConfig]
    origin: Origin
    summary: str
    """First line of the class's docstring."""


class Registry:
    """The plugins of one command, by kind and name, and the manager that calls their hooks."""

    def __init__(
        self,
        hooks: pluggy.PluginManager,
        plugins: Sequence[Registered],
        origins: Sequence[Origin],
        broken: Sequence[str] = (),
    ) -> None:
        """Hold what ``load_registry`` found."""
        self.hooks = hooks
        self.broken = tuple(broken)
        """What is wrong with each file of the ``plugins`` folder that could not be loaded."""
        self._plugins: Mapping[str, Mapping[str, Registered]] = {
            kind: {item.name: item for item in sorted(plugins, key=lambda one: one.name) if item.kind == kind}
            for kind in KINDS
        }
        self._origins = tuple(origins)

    def names(self, kind: str) -> list[str]:
        """List the names of a kind, sorted."""
        return list(self._of(kind))

    def of_kind(self, kind: str) -> list[Registered]:
        """List the plugins of a kind, sorted by name."""
        return list(self._of(kind).values())

    def get(self, kind: str, name: str) -> Registered:
        """Give the plugin of that kind and name.

        Raises:
            PluginError: there is none; names the nearest and all others.
        """
        known = self._of(kind)
        if name not in known:
            raise PluginError(f"{kind}: there is no {kind} {name!r}; {self.advice(kind, name)}")
        return known[name]

    def advice(self, kind: str, name: str) -> str:
        """Word what follows after the name of a plugin that there is not."""
        advice = suggestion(name, self.names(kind))
        return "; ".join([advice, *(f"not loaded: {problem}" for problem in self.broken)])

    def origins(self) -> list[Origin]:
        """List where plugins came from, in the order of loading."""
        return list(self._origins)

    def _of(self, kind: str) -> Mapping[str, Registered]:
        if kind not in self._plugins:
            raise PluginError(f"{kind!r} is no kind of plugin; {suggestion(kind, list(KINDS))}")
        return self._plugins[kind]


def load_registry(
    plugin_paths: Sequence[Path] | None = None,
    near: Path | None = None,
    built_in: Sequence[str] = BUILT_IN,
) -> Registry:
    """Load all plugins: the built-in ones, those of installed packages, then local files, each sorted.

    Files whose name begins with ``_``, ``.`` or ``test_``, and ``conftest.py``, are no plugins. A file of the
    ``plugins`` folder that cannot be loaded is left out and listed in ``broken``: a recipe that does not
    need it runs all the same.

    Args:
        plugin_paths: files, packages or folders of them, instead of the search for a ``plugins`` folder.
        near: the recipe, or a folder: the nearest ``plugins`` folder at or above it is loaded; None loads
            no local plugins.
        built_in: modules of the built-in plugins; where only some are wanted, the others take time.

    Raises:
        PluginError: a plugin that was asked for or that is installed cannot be loaded or breaks the rules,
            or two have one name; names every file concerned.
    """
    manager = pluggy.PluginManager("dteframe")
    manager.add_hookspecs(hookspecs)
    known: dict[tuple[str, str], Registered] = {}
    origins: list[Origin] = []
    problems: list[str] = []
    broken: list[str] = []
    for load in plugin_sources(plugin_paths, near, built_in):
        try:
            plugin, origin = load()
            found = _register(manager, plugin, origin)
        except PluginError as error:
            is_searched = plugin_paths is None and isinstance(load, LocalSource)
            (broken if is_searched else problems).append(str(error))
            continue
        origins.append(origin)
        problems += [clash for item in found if (clash := _clash(known, item))]
        known.update({(item.kind, item.name): item for item in found})
    if problems:
        raise PluginError("\n".join([*problems, *broken]))
    return Registry(manager, tuple(known.values()), origins, broken)


def suggestion(word: str, known: Sequence[str]) -> str:
    """Word the advice after an unknown name: the nearest spelling if there is one, and what is known."""
    nearest = difflib.get_close_matches(word, known, n=1)
    listed = f"known: {', '.join(known) or 'none'}"
    return f"did you mean {nearest[0]!r}? ({listed})" if nearest else listed


# Registering what was imported.


def _register(manager: pluggy.PluginManager, plugin: object, origin: Origin) -> list[Registered]:
    """Hand the plugin to the manager; check its hooks and components."""
    where = origin.label if origin.label != "built-in" else shown(origin.path or Path())
    if manager.is_registered(plugin):
        raise PluginError(f"{where}: is already loaded under another name; remove one of the two")
    unknown = next(iter(_unknown_hooks(manager, plugin)), None)
    if unknown is not None:
        raise PluginError(f"{where}{unknown}")
    try:
        manager.register(plugin, name=_plugin_name(plugin, origin))
        manager.check_pending()
        return _components_of(manager, plugin, origin, where)
    except (PluginError, pluggy.PluginValidationError) as error:
        if manager.is_registered(plugin):
            manager.unregister(plugin)  # Its hooks are not called either.
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"{where}: {one_line(str(error))}") from error


def _components_of(
    manager: pluggy.PluginManager, plugin: object, origin: Origin, where: str
) -> list[Registered]:
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"{where}: adds no plugin and watches no hook; {_missing_hook_advice(plugin)}")
    found: list[Registered] = []
    for implementation in manager.hook.dteframe_components.get_hookimpls():
        if implementation.plugin is plugin:
            found.extend(
                _registered(manager, component, origin, where)
                for component in _given_components(implementation.function, where)
            )
    return found


def _plugin_name(plugin: object, origin: Origin) -> str:
    return plugin.__name__ if isinstance(plugin, ModuleType) else origin.label


def _given_components(function: Any, where: str) -> Sequence[object]:
    try:
        given = function()
    except Exception as error:  # a user's function may raise anything
        raise PluginError(f"{where}: dteframe_components() failed: {said(error)}") from error
    if not isinstance(given, list | tuple):
        alone = given.__name__ if isinstance(given, type) else repr(given)
        raise PluginError(f"{where}: dteframe_components() must give a list of plugin classes, not {alone}")
    return given


def _registered(manager: pluggy.PluginManager, component: object, origin: Origin, where: str) -> Registered:
    """Check that the class keeps the rules of a plugin, and look up its configuration."""
    kinds = ", ".join(contract.__name__ for contract in KINDS.values())
    if not (isinstance(component, type) and issubclass(component, Component)):
        given = component.__name__ if isinstance(component, type) else repr(component)
        raise PluginError(f"{where}: {given} is no plugin class; subclass one of {kinds}")
    contracts = [contract for contract in KINDS.values() if issubclass(component, contract)]
    if len(contracts) != 1 or component in contracts:
        raise PluginError(f"{where}: {component.__name__} must be a subclass of exactly one of {kinds}")
    where = f"{where}: {component.__name__}"
    kind = contracts[0].kind
    missing = sorted(getattr(component, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{where}: does not define {_and(missing)}, which every {kind} must have")
    unknown = next(iter(_unknown_hooks(manager, component)), None)
    if unknown is not None:
        raise PluginError(f"{where}{unknown}")
    config = _config_of(component, contracts[0], where)
    name = _name_of(config, where)
    summary = (inspect.cleandoc(component.__doc__ or "").splitlines() or [""])[0]
    return Registered(kind, name, component, config, origin, summary)


def _config_of(component: type[Component], contract: type[Component], where: str) -> type[PluginConfig]:
    wanted = _annotated_config(contract)
    assert wanted is not None
    advice = f"write `config: {component.__name__}Config` into the class, its subclass of {wanted.__name__}"
    owners = component.__mro__[: component.__mro__.index(contract)]
    if not any("config" in vars(owner).get("__annotations__", {}) for owner in owners):
        raise PluginError(f"{where}: has no annotation 'config'; {advice}")
    config = _annotated_config(component)
    if config is None or not issubclass(config, wanted):
        given = config.__name__ if config else "a name that its module does not define as a class"
        raise PluginError(f"{where}: its 'config' is annotated with {given}; {advice}")
    return config


def _annotated_config(component: type[Component]) -> type[PluginConfig] | None:
    """Resolve the nearest annotation ``config``; the others may name types that only checkers import."""
    for owner in component.__mro__:
        if "config" in vars(owner).get("__annotations__", {}):
            annotation = vars(owner)["__annotations__"]["config"]
            if isinstance(annotation, str):
                annotation = vars(sys.modules[owner.__module__]).get(annotation)
            return annotation if isinstance(annotation, type) else None
    return None


def _name_of(config: type[PluginConfig], where: str) -> str:
    where = f"{where}: {config.__name__}"
    if not config.model_rebuild(raise_errors=False) and not config.__pydantic_complete__:
        raise PluginError(f"{where}: an annotation names a type that is not defined when the file is loaded")
    field = config.model_fields["type"]
    is_literal = get_origin(field.annotation) is Literal
    if not is_literal or field.default is PydanticUndefined or get_args(field.annotation) != (field.default,):
        raise PluginError(
            f'{where}: must name the plugin; write `type: Literal["some_name"] = "some_name"` into it'
        )
    name = field.default
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
        raise PluginError(
            f"{where}: {name!r} cannot be a plugin's name; use small letters, digits and underscores"
        )
    return name


def _clash(known: Mapping[tuple[str, str], Registered], item: Registered) -> str:
    """Say which other plugin has the name already; empty if none has. Which one is meant would be a guess."""
    other = known.get((item.kind, item.name))
    if other is None:
        return ""
    return (
        f"{item.origin.label}: {item.kind} {item.name!r} is already defined by "
        f"{_full_label(other.origin)}; rename one of them"
    )


def _unknown_hooks(manager: pluggy.PluginManager, plugin: object) -> Iterator[str]:
    """Word what is wrong with hook implementations that no hook specification knows."""
    specified = [name for name in vars(hookspecs) if name.startswith("dteframe_")]
    for name in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, name) is None:
            continue
        function = inspect.unwrap(getattr(plugin, name))
        line = f":{function.__code__.co_firstlineno}" if isinstance(function, FunctionType) else ""
        if isinstance(plugin, type):
            line = ""
        if name not in specified:
            yield f"{line}: there is no hook {name!r}; {suggestion(name, specified)}"
            continue
        taken = [one for one in inspect.signature(function).parameters if one != "self"]
        given = list(inspect.signature(getattr(hookspecs, name)).parameters)
        extra = [one for one in taken if one not in given]
        if extra:
            has = f"has {_and(given)}" if given else "takes nothing"
            yield f"{line}: {name}() asks for {_and(extra)}, but the hook {has}"


def _missing_hook_advice(plugin: object) -> str:
    plain = [name for name in dir(plugin) if name.startswith("dteframe_")]
    if plain:
        return f"put @hookimpl above {_and([f'{name}()' for name in plain])}"
    return "end the file with a function dteframe_components() under @hookimpl"


def _full_label(origin: Origin) -> str:
    if origin.path is None or origin.label == shown(origin.path):
        return origin.label
    return f"{origin.label} ({shown(origin.path)})"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
