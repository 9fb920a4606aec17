"""What the estimator my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import numpy as np
import pytest

from dteframe import Observation
from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject, letters_of
from dteframe.testing.tiny import tiny_questions

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("estimator", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_a_question_without_measurement_gets_the_average(plugin: Subject) -> None:
    """(0.25 + 0.5) / 2 = 0.375 for the third."""
    estimator = plugin.make()
    estimator.start(tiny_questions(3), letters_of)
    ids = ("sum-000", "sum-001")
    estimator.observe(Observation(ids, np.array([1, 2]), np.array([4, 4]), 0, "train"))
    assert estimator.predict(1).mean.tolist() == [0.25, 0.5, 0.375]
