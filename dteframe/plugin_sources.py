"""Find the modules of plugins and import them: built-in ones, those of installed packages, local files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

from dteframe.errors import PluginError

BUILT_IN = (
    "dteframe.models.pretrained",
    "dteframe.models.from_scratch",
    "dteframe.datasets.huggingface",
    "dteframe.datasets.files",
    "dteframe.datasets.reasoning_gym",
    "dteframe.datasets.list_operations",
    "dteframe.rewards.math_verify",
    "dteframe.rewards.exact_match",
    "dteframe.rewards.reasoning_gym",
    "dteframe.rewards.format",
    "dteframe.estimators.none",
    "dteframe.estimators.attention",
    "dteframe.estimators.beta_posterior",
    "dteframe.estimators.recorded",
    "dteframe.estimators.history_and_attention",
    "dteframe.estimators.policy_probe",
    "dteframe.selectors.uniform",
    "dteframe.selectors.difficulty_target",
    "dteframe.selectors.informative_probability",
    "dteframe.selectors.thompson_target",
    "dteframe.selectors.skip_zero_variance",
    "dteframe.selectors.dynamic_sampling",
    "dteframe.replay.none",
    "dteframe.replay.fifo",
    "dteframe.replay.prioritised",
    "dteframe.rollouts.transformers",
    "dteframe.rollouts.vllm",
    "dteframe.objectives.grpo",
    "dteframe.trackers.tensorboard",
    "dteframe.trackers.console",
    "dteframe.trackers.jsonl",
)
"""The modules of the plugins that come with DTEFrame."""

ENTRY_POINT_GROUP = "dteframe"
PLUGIN_FOLDER = "plugins"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a plugin came from; written to the run's manifest."""

    label: str
    """``built-in``, ``dist 1.2 (entry point x)`` or the file, such as ``plugins/foo.py``."""
    path: Path | None
    """The module's file, where it has one."""
    sha256: str | None
    """Hash of the module's source; of all Python files of a package."""

    @property
    def is_local(self) -> bool:
        """Whether it is a file of the user's, and not of DTEFrame or of an installed package."""
        return self.label != "built-in" and "(entry point " not in self.label


Source = Callable[[], tuple[object, Origin]]
"""Imports one plugin when it is called, and says where it is from; raises PluginError."""


def plugin_sources(
    plugin_paths: Sequence[Path] | None, near: Path | None, built_in: Sequence[str] = BUILT_IN
) -> list[Source]:
    """Find all plugins, in the order in which they are to be loaded, without importing any."""
    files = _listed_plugins(plugin_paths) if plugin_paths is not None else _nearest_plugins(near)
    entry_points = sorted(
        importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda one: (one.name, one.value)
    )
    return [
        *(_BuiltInSource(name) for name in built_in),
        *(_EntryPointSource(item) for item in entry_points),
        *(LocalSource(file) for file in files),
    ]


def one_line(text: str) -> str:
    """Join the lines of a message."""
    return " ".join(text.split())


def said(error: BaseException) -> str:
    """Word an error as one line: its type and its message."""
    return f"{type(error).__name__}: {one_line(str(error))}"


def shown(path: Path) -> str:
    """Shorten a path below the current folder, as a person would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@dataclass(frozen=True)
class _BuiltInSource:
    module_name: str

    def __call__(self) -> tuple[object, Origin]:
        module = importlib.import_module(self.module_name)
        path = _file_of(module)
        return module, Origin("built-in", path, _sha256(path))


@dataclass(frozen=True)
class _EntryPointSource:
    entry_point: importlib.metadata.EntryPoint

    def __call__(self) -> tuple[object, Origin]:
        dist = self.entry_point.dist
        package = f"{dist.name} {dist.version}" if dist else self.entry_point.value
        label = f"{package} (entry point {self.entry_point.name})"
        try:
            plugin: object = self.entry_point.load()
        except Exception as error:  # a foreign package may raise anything while it is imported
            raise PluginError(f"{label}: cannot be loaded: {said(error)}") from error
        path = _file_of(plugin)
        return plugin, Origin(label, path, _sha256(path))


@dataclass(frozen=True)
class LocalSource:
    """A file of the user's."""

    file: Path

    def __call__(self) -> tuple[object, Origin]:
        """Import it."""
        try:
            origin = Origin(shown(self.file), self.file, _sha256(self.file))
        except OSError as error:
            raise PluginError(
                f"{shown(self.file)}: cannot be read ({error.strerror}); mend it or move it away"
            ) from error
        return _import_file(self.file, origin.label), origin


def _listed_plugins(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for given in paths:
        path = given.resolve()
        if not path.exists():
            raise PluginError(f"{given}: no such file or folder of plugins; check --plugins")
        if path.is_dir() and not (path / "__init__.py").is_file():
            inside = _plugins_in(path)
            if not inside:
                raise PluginError(f"{given}: no plugins in this folder; it needs *.py files, or packages")
            found.extend(inside)
        elif path.is_dir():
            found.append(path / "__init__.py")
        elif path.suffix == ".py":
            found.append(path)
        else:
            raise PluginError(f"{given}: not a Python file; a plugin is a .py file or a folder of them")
    return sorted(set(found))


def _nearest_plugins(near: Path | None) -> list[Path]:
    if near is None:
        return []
    start = near.resolve()
    for folder in (start, *start.parents):
        if (folder / PLUGIN_FOLDER).is_dir():
            return _plugins_in(folder / PLUGIN_FOLDER)
    return []


def _plugins_in(folder: Path) -> list[Path]:
    found = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    named = {path: path.parent.name if path.name == "__init__.py" else path.name for path in found}
    return sorted(
        path
        for path, name in named.items()
        if path.parent != folder or path.name != "__init__.py"
        if not name.startswith(("_", ".", "test_")) and name != "conftest.py"
    )


# Importing a local file.


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compile the file as it is now: a cached ``.pyc`` may be older by less than a clock tick."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _import_file(file: Path, label: str) -> ModuleType:
    """Import a file under a name that no other file has; a package also finds its own modules."""
    unique = hashlib.sha256(os.fsencode(file)).hexdigest()[:12]
    is_package = file.name == "__init__.py"
    stem = re.sub(r"\W", "_", file.parent.name if is_package else file.stem)
    name = f"dteframe_plugin_{stem}_{unique}"
    spec = importlib.util.spec_from_file_location(
        name,
        file,
        loader=_SourceLoader(name, str(file)),
        submodule_search_locations=[str(file.parent)] if is_package else None,
    )
    assert spec is not None
    assert spec.loader is not None
    for stale in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
        del sys.modules[stale]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # typing and dataclasses look names up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        where, what = _import_failure(error, file, label)
        raise PluginError(f"{where}: cannot be imported: {what}") from error
    return module


def _import_failure(error: BaseException, file: Path, label: str) -> tuple[str, str]:
    """Find the innermost line of the plugin's own files that led to the error, and word the error."""
    own = file.parent if file.name == "__init__.py" else file
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((error.filename, error.lineno))
        what = f"{type(error).__name__}: {error.msg}"
    else:
        what = said(error)
    inside = [(name, line) for name, line in frames if Path(name) == own or own in Path(name).parents]
    if not inside:
        return label, what
    name, line = inside[-1]
    place = label if Path(name) == file else shown(Path(name))
    return f"{place}:{line}", what


def _file_of(plugin: object) -> Path | None:
    name = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file else None


def _sha256(file: Path | None) -> str | None:
    """Hash a module's source; for a package, the names and sources of all of its Python files."""
    if file is None:
        return None
    if file.name != "__init__.py":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")):
        digest.update(path.relative_to(file.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
