"""What the tracker my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import pytest

from dteframe.registry import load_registry
from dteframe.reports import EvaluationReport
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("tracker", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_writes_a_line_per_evaluation(plugin: Subject) -> None:
    """Step, success rate and standard error, separated by tabulators."""
    tracker = plugin.make()
    for step, rate in ((0, 0.25), (10, 0.5)):
        tracker.dteframe_evaluated(step, EvaluationReport(rate, 0.1, 0.75, 8, 4, 12.5, 0.0))
    written = (tracker.context.run_folder / "my_plugin.tsv").read_text()
    assert written == "0\t0.25\t0.1\n10\t0.5\t0.1\n"
