"""Docs are run: fences, recipes, links, keys and written pages. docs/guides has a test of its own."""

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dteframe.contracts import KINDS
from dteframe.recipe import TrainingConfig, load_recipe
from dteframe.registry import Registry, load_registry

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
RUN_PAGES = [page for page in PAGES if "guides" not in page.parts]


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line}"


def fences(language: str) -> list[Fence]:
    found = []
    for page in RUN_PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Fence(page, line, match[1], match[2]))
    return [fence for fence in found if fence.language == language]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(plugin_paths=[])


@pytest.fixture(scope="module")
def written_pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("write_tables", PROJECT / "docs" / "write_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("fence", fences("python"), ids=str)
def test_python_in_the_docs_runs(fence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * fence.line + fence.text, str(fence.page), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("fence", fences("console"), ids=str)
def test_commands_in_the_docs_print_what_is_shown(fence):
    for part in re.split(r"^\$ ", fence.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        words = shlex.split(command)
        assert words[0] == "dteframe", f"{fence}: only dteframe is run; show other commands indented"
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, shown.strip())


@pytest.mark.parametrize("fence", fences("yaml"), ids=str)
def test_recipes_in_the_docs_are_valid(fence, registry, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(fence.text, encoding="utf-8")
    assert load_recipe(path, [], registry).notes == ()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{linked.name} has no heading #{anchor}"


def anchors(page: Path) -> set[str]:
    """Name the headings of a page as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_dotted_key_in_the_docs_exists(registry):
    known = {f"training.{name}" for name in TrainingConfig.model_fields}
    known |= {
        f"{kind}.{key}"
        for kind in KINDS
        for item in registry.of_kind(kind)
        for key in item.config.model_fields
    }
    named = re.compile(rf"`((?:training|{'|'.join(KINDS)})\.[a-z_0-9]+)\b")
    missing = {
        f"{page.relative_to(PROJECT)}: {key}"
        for page in RUN_PAGES
        for key in named.findall(page.read_text(encoding="utf-8"))
        if key not in known
    }
    assert missing == set()


@pytest.mark.parametrize("name", ["cli.md", "hooks.md", "metrics.md", "plugins.md", "recipe_keys.md"])
def test_written_pages_are_up_to_date(name, written_pages):
    committed = (PROJECT / "docs" / name).read_text(encoding="utf-8")
    assert committed == written_pages[name], f"docs/{name} is not what the code says; run `make docs`"


def test_every_written_page_is_compared(written_pages):
    assert sorted(written_pages) == ["cli.md", "hooks.md", "metrics.md", "plugins.md", "recipe_keys.md"]
