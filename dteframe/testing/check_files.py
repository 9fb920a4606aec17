"""Check the promises of every plugin in some files: what ``dteframe check`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dteframe.contracts import KINDS
from dteframe.errors import PluginError
from dteframe.registry import Registered, load_registry
from dteframe.testing.checks import Failure, check_component, promises


@dataclass(frozen=True, slots=True)
class Checked:
    """A plugin and how it keeps its promises."""

    file: str
    kind: str
    name: str
    kept: tuple[str, ...]
    broken: tuple[Failure, ...]


def check_files(files: Sequence[Path]) -> Iterator[Checked]:
    """Check the plugins of each file, one after the other.

    Raises:
        PluginError: a file cannot be loaded, or adds no component.
    """
    for file in files:
        found = _plugins_of(file)
        if not found:
            raise PluginError(f"{file}: adds no component; return its class from dteframe_components()")
        for registered in found:
            with tempfile.TemporaryDirectory(prefix="dteframe-check-") as folder:
                broken = check_component(registered, Path(folder))
            names = {failure.promise for failure in broken}
            kept = [item.__name__ for item in promises(registered.kind) if item.__name__ not in names]
            yield Checked(str(file), registered.kind, registered.name, tuple(kept), tuple(broken))


def checked_text(checked: Checked) -> str:
    """Word the outcome: a line per promise; below a broken one what happened, and what to do."""
    lines = [f"{checked.file}: {checked.kind} {checked.name}"]
    lines += [f"  kept    {name}" for name in checked.kept]
    for failure in checked.broken:
        lines.append(f"  BROKEN  {failure.promise}: {failure.what}")
        lines += [f"          {line}".rstrip() for line in failure.advice.splitlines()]
    total = len(checked.kept) + len(checked.broken)
    lines.append(f"  {len(checked.kept)} of {total} promises kept")
    return "\n".join(lines)


def _plugins_of(file: Path) -> list[Registered]:
    registry = load_registry([file])
    return [
        item
        for kind in KINDS
        for item in registry.of_kind(kind)
        if item.origin.path is not None and _is_of(item.origin.path, file)
    ]


def _is_of(path: Path, file: Path) -> bool:
    return path.resolve() == file.resolve() or file.resolve() in path.resolve().parents
