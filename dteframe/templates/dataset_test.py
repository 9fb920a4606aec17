"""What the dataset my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import pytest

from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("dataset", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_a_line_without_an_answer_is_counted(plugin: Subject) -> None:
    """Two lines, the second without an answer."""
    config = plugin.config()
    Path(config.path).write_text("1+1=\t2\n1+2=\n", encoding="utf-8")
    questions = plugin.make(config).load()
    assert [(question.text, question.answer) for question in questions.train] == [("1+1=", "2")]
    assert questions.left_out == {"line without a question or an answer": 1}
