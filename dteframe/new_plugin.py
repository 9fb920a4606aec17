"""Write a new plugin and its test from the template of its kind: what ``dteframe new`` does."""

from __future__ import annotations

import importlib.resources
import keyword
import re
from pathlib import Path

from dteframe.errors import PluginError
from dteframe.plugin_sources import shown
from dteframe.registry import load_registry


def write_plugin(kind: str, name: str, folder: Path) -> tuple[Path, Path]:
    """Write ``folder/NAME.py``, and its test to the folder ``tests`` beside ``folder``.

    Args:
        kind: one of the kinds of plugin.
        name: what recipes will call it: small letters, digits and ``_``.
        folder: where local plugins are; made if it does not exist.

    Returns:
        The plugin and its test.

    Raises:
        PluginError: the kind is unknown, the name does not fit or is taken, or a file exists.
    """
    taken = load_registry(plugin_paths=[]).names(kind)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name.startswith("test_"):
        raise PluginError(
            f"{name!r} cannot be the name of a plugin; use small letters, digits and _, such as 'my_{kind}'"
        )
    if name in taken:
        raise PluginError(f"{kind} {name!r} comes with DTEFrame or a package; choose another name")
    folder = folder.resolve()
    plugin, test = folder / f"{name}.py", folder.parent / "tests" / f"test_{name}.py"
    existing = [shown(path) for path in (plugin, test) if path.exists()]
    if existing:
        raise PluginError(f"{' and '.join(existing)}: exists; remove it or choose another name")
    for path, template in ((plugin, f"{kind}.py"), (test, f"{kind}_test.py")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled_in(template, name, folder.name), encoding="utf-8")
    return plugin, test


def _filled_in(template: str, name: str, folder_name: str) -> str:
    source = importlib.resources.files("dteframe") / "templates" / template
    class_name = "".join(part.capitalize() for part in name.split("_"))
    text = source.read_text(encoding="utf-8").replace("my_plugin", name).replace("MyPlugin", class_name)
    return text.replace('/ "plugins" /', f'/ "{folder_name}" /')
