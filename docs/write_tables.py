"""Write the pages of docs/ that repeat what the code says: run by ``make docs``, compared by a test.

The pages come from docstrings, configurations and commands; nobody edits them by hand.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dteframe import contracts, hookspecs, reports
from dteframe.plugin_listing import options_of
from dteframe.recipe import TrainingConfig, json_schema
from dteframe.registry import Registered, Registry, load_registry

DOCS = Path(__file__).parent
NOTE = "<!-- written by docs/write_tables.py from the code; change it there and run `make docs` -->"


def pages() -> dict[str, str]:
    """Give the text of every written page by file name."""
    registry = load_registry(plugin_paths=[])
    return {
        "cli.md": _cli_page(),
        "hooks.md": _hooks_page(),
        "metrics.md": _metrics_page(),
        "plugins.md": _plugins_page(registry),
        "recipe_keys.md": _recipe_keys_page(registry),
    }


# Metrics


def _metrics_page() -> str:
    """Describe every figure of every stage."""
    found = attribute_docstrings(reports)
    parts = [
        "# Metrics",
        NOTE,
        "`metrics.jsonl` has one flat object per step: `step`, and `stage/figure` for every figure below "
        "that the step has. TensorBoard shows the same names. What does not exist at a step is left out; "
        "null is a number that was not finite. Step 0 is the evaluation before training.",
    ]
    for stage in _stage_reports():
        rows = [
            (f"`{stage.stage}/{'NAME' if name == 'figures' else name}`", text)
            for name, text in found[stage.__name__].items()
            if name != "stage"
        ]
        parts += [f"## {stage.stage}", _summary(stage), _table(("metric", "meaning"), rows)]
    return _page(parts)


def _stage_reports() -> list[type[reports.StageReport]]:
    """List the stages in the order of the module; ``__subclasses__`` has each twice, because of slots."""
    classes = [item for item in vars(reports).values() if isinstance(item, type)]
    return [
        item for item in classes if issubclass(item, reports.StageReport) and item is not reports.StageReport
    ]


# Hooks


def _hooks_page() -> str:
    """Describe the hooks and the records that they get."""
    functions = [getattr(hookspecs, name) for name in vars(hookspecs) if name.startswith("dteframe_")]
    parts = [
        "# Hooks",
        NOTE,
        "Components decide, hooks watch: all but the first get frozen records and return nothing. A tracker "
        "implements them as methods with `@hookimpl`, a plugin module as functions.",
    ]
    for function in functions:
        signature = f"{function.__name__}{inspect.signature(function)}".replace("'", "")
        parts += [f"## {function.__name__}", f"```text\n{signature}\n```", _summary(function)]
    parts += ["## Records", "What the hooks hand over, from `dteframe.reports`."]
    found = attribute_docstrings(reports)
    for name in ("RunReport", "PlanReport", "GroupsReport", "StepReport", "RunSummary"):
        record = getattr(reports, name)
        rows = [
            (f"`{item}`", f"`{annotation}`", found[name].get(item, ""))
            for item, annotation in inspect.get_annotations(record).items()
        ]
        parts += [f"### {name}", _summary(record), _table(("field", "type", "meaning"), rows)]
    return _page(parts)


# Plugins


def _plugins_page(registry: Registry) -> str:
    """Describe the built-in plugins of every kind with their options."""
    parts = [
        "# Plugins",
        NOTE,
        "The plugins that come with DTEFrame, by the recipe key that names them with `type:`. "
        "`dteframe plugins` lists these and yours.",
    ]
    for kind, contract in contracts.KINDS.items():
        parts += [f"## {kind}", _summary(contract)]
        for item in registry.of_kind(kind):
            if item.origin.label == "built-in":
                parts += _plugin_parts(item)
    return _page(parts)


def _plugin_parts(item: Registered) -> list[str]:
    rows = list(_option_rows(item.config, ""))
    table = _table(("option", "type", "default", "meaning"), rows) if rows else "No options."
    return [f"### {item.kind}: {item.name}", item.summary, table]


# Recipe keys


def _recipe_keys_page(registry: Registry) -> str:
    """Describe the keys of a recipe, as editors get them, and those of ``training``."""
    schema = json_schema(registry)
    rows = [
        (f"`{key}`", _schema_default(key, schema), _schema_meaning(key, schema))
        for key in schema["properties"]
    ]
    parts = [
        "# Recipe keys",
        NOTE,
        "On the command line any key is changed with `dteframe run RECIPE key=value ...`, with dots inside.",
        _table(("key", "default", "meaning"), rows),
        "## training",
        _summary(TrainingConfig),
        _table(("key", "type", "default", "meaning"), list(_option_rows(TrainingConfig, "training."))),
    ]
    return _page(parts)


def _schema_default(key: str, schema: Mapping[str, Any]) -> str:
    if key in schema["required"]:
        return "required"
    return f"`{json.dumps(schema['properties'][key]['default'])}`"


def _schema_meaning(key: str, schema: Mapping[str, Any]) -> str:
    if key == "training":
        return "See [below](#training)."
    meaning = _one_line(schema["properties"][key]["description"])
    return f"{meaning} See [plugins.md](plugins.md#{key})." if key in contracts.KINDS else meaning


# Command line


def _cli_page() -> str:
    """Take over what Typer writes of every command."""
    command = [sys.executable, "-m", "typer", "dteframe.cli", "utils", "docs", "--name", "dteframe"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The usage lines are no commands to try; one heading of level 1 is enough; summaries are cut off.
    described = html.unescape(written).replace("```console\n$ ", "```text\n").removeprefix("# `dteframe`\n")
    lines, group = described.split("\n"), "dteframe"
    for place, line in enumerate(lines):
        if heading := re.match(r"##+ `(.+)`$", line):
            group = heading[1].replace(" ", "-")
        lines[place] = re.sub(r"^\* `([a-z]+)`: .*$", rf"* [`\1`](#{group}-\1)", line)
    described = "\n".join(lines)
    return _page(["# Command line", NOTE, "`python -m dteframe` does the same.", described.strip()])


# What all pages need


def attribute_docstrings(module: types.ModuleType) -> dict[str, dict[str, str]]:
    """Read the strings under the annotated fields of every class in a module: class -> field -> text."""
    found: dict[str, dict[str, str]] = {}
    for item in ast.parse(inspect.getsource(module)).body:
        if not isinstance(item, ast.ClassDef):
            continue
        fields = found.setdefault(item.name, {})
        for statement, following in zip(item.body, [*item.body[1:], ast.Pass()], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                is_docstring = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                fields[statement.target.id] = _one_line(following.value.value) if is_docstring else ""
    return found


def _option_rows(config: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Give key, type, default and meaning of every option; those of nested options follow with a dot."""
    for option in options_of(config, prefix):
        default = "required" if option.default is None else f"`{option.default}`"
        condition = f"With `{option.only_with}`: " if option.only_with else ""
        yield f"`{option.name}`", option.type, default, _one_line(condition + option.description)


def _summary(documented: Any) -> str:
    return _one_line(inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(_cell(text) for text in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Write the pages and name those that changed."""
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stderr.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
