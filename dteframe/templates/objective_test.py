"""What the objective my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import numpy as np
import pytest

from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("objective", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_one_right_answer_in_four_stands_out(plugin: Subject) -> None:
    """The mean of the rewards is 0.25."""
    advantages = plugin.make().advantages(np.array([1.0, 0.0, 0.0, 0.0]))
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]
