"""The guides are run: each from top to bottom, in a folder of its own.

A fence with a path (`python plugins/mine.py`) is written there, several of the same path one below the other.
Other Python fences are executed. `console` fences run `dteframe` and `pytest`; `...` stands for any text.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dteframe.recipe import load_recipe
from dteframe.registry import load_registry

PROJECT = Path(__file__).parents[1]
GUIDES = sorted((PROJECT / "docs" / "guides").glob("*.md"))
PLUGIN_GUIDES = [guide for guide in GUIDES if guide.stem.startswith("write_")]
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE_THAT_FAILS = {"validate recipe.yaml reward.1.full_penalty_tokens=3": 2}
"""Exit codes of the commands that a guide shows failing."""


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_works_from_top_to_bottom(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTEFRAME_CACHE", str(tmp_path / "cache"))
    names = {"__name__": guide.stem}
    written = {}
    for language, path, text in FENCE.findall(guide.read_text(encoding="utf-8")):
        if path:
            written.setdefault(path, []).append(text)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text("\n".join(written[path]), encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(guide), "exec"), names)
        elif language == "console":
            run_console(text)
        else:
            pytest.fail(f"{guide.name}: a fence of {language!r} is neither run nor written")


def run_console(text):
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        words = shlex.split(command)
        assert words[0] in ("dteframe", "pytest"), f"{command}: is no command of a guide"
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env={**os.environ, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        wanted = CODE_THAT_FAILS.get(" ".join(words[1:]), 0)
        assert done.returncode == wanted, f"{command}\n{done.stdout}"
        assert re.fullmatch(as_pattern(shown), done.stdout.strip(), re.DOTALL), f"{command}\n{done.stdout}"


def as_pattern(shown):
    """Turn shown output into a pattern: `...` is any text, also none, also over several lines."""
    return ".*".join(re.escape(piece.strip("\n")) for piece in shown.strip().split("...")).replace(
        ".*", r"\n?.*\n?"
    )


def test_dots_stand_for_any_text():
    assert re.fullmatch(as_pattern("a\n...\nb (...)\n"), "a\n1\n2\nb (c)", re.DOTALL)
    assert re.fullmatch(as_pattern("a\n...\n"), "a", re.DOTALL)
    assert not re.fullmatch(as_pattern("a\n...\nb\n"), "a\n1\nc", re.DOTALL)


@pytest.mark.parametrize("guide", PLUGIN_GUIDES, ids=lambda guide: guide.stem)
def test_the_plugin_of_a_guide_is_the_one_in_the_plugins_folder(guide):
    parts = {}
    for _, path, text in FENCE.findall(guide.read_text(encoding="utf-8")):
        if path.startswith("plugins/"):
            parts.setdefault(path, []).append(text)
    assert len(parts) == 1
    for path, texts in parts.items():
        assert lines("\n".join(texts)) == lines((PROJECT / path).read_text(encoding="utf-8"))


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("guide", PLUGIN_GUIDES, ids=lambda guide: guide.stem)
def test_recipes_of_a_guide_are_valid(guide, tmp_path):
    registry = load_registry(near=PROJECT)
    for _, path, text in FENCE.findall(guide.read_text(encoding="utf-8")):
        if path.endswith(".yaml"):
            (tmp_path / path).write_text(text, encoding="utf-8")
            assert load_recipe(tmp_path / path, [], registry).recipe.name
