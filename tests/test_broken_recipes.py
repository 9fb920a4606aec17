"""Each file of broken_recipes/ gives exactly the messages that stand beside it."""

from pathlib import Path

import pytest

from dteframe import RecipeError
from dteframe.recipe import load_recipe
from dteframe.registry import Registry, load_registry

FOLDER = Path(__file__).parent / "broken_recipes"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def messages(name: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(FOLDER)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path(f"{name}.yaml"), (), registry)
    return f"{caught.value}\n"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_broken_recipe_gives_exactly_its_messages(name, registry, monkeypatch):
    expected = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert messages(name, registry, monkeypatch) == expected


def test_every_file_of_messages_has_its_recipe_and_there_are_at_least_thirty():
    recipes = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {path.stem for path in FOLDER.glob("*.txt")} == recipes
    assert len(recipes) >= 30
