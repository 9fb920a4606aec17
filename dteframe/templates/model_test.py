"""What the model my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import pytest

from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("model", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_loads_in_the_type_of_the_recipe(plugin: Subject) -> None:
    """The folder holds float32 weights."""
    config = plugin.config().model_copy(update={"dtype": "bfloat16"})
    module = plugin.make(config).load(plugin.questions).module
    assert {str(parameter.dtype) for parameter in module.parameters()} == {"torch.bfloat16"}
