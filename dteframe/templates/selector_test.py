"""What the selector my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import numpy as np
import pytest

from dteframe import SuccessEstimate
from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("selector", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_asks_the_nearest_to_one_half_first(plugin: Subject) -> None:
    """The distances are 0.4, 0.3 and 0."""
    estimate = SuccessEstimate(("easy", "hard", "fair"), np.array([0.9, 0.2, 0.5]), np.zeros(3))
    selection = plugin.make().select(estimate, 2, np.random.default_rng(0))
    assert selection.question_ids == ("fair", "hard")
