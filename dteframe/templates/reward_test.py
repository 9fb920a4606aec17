"""What the reward my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import pytest

from dteframe import Question
from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject, completion_of

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("reward", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_only_the_end_of_the_text_counts(plugin: Subject) -> None:
    """Capital letters do not, unless `ignore_case` is off."""
    question = Question(id="q", text="Capital of France?", prompt="Capital of France?", answer="Paris")
    texts = ("It is paris", "Paris, I think", "")
    assert plugin.make().score(question, [completion_of(text) for text in texts]) == [1.0, 0.0, 0.0]
