"""What the replay my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import numpy as np
import pytest

from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject, group_of

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("replay", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_gives_the_newest_informative_group_once(plugin: Subject) -> None:
    """The group without a success is not kept; a drawn one is gone."""
    replay = plugin.make()
    replay.offer([group_of("first", successes=1), group_of("second", successes=2), group_of("hard", 0)])
    drawn = [replay.draw(1, 1, frozenset(), np.random.default_rng(0)) for _ in range(3)]
    assert [[group.question_id for group in groups] for groups in drawn] == [["second"], ["first"], []]
