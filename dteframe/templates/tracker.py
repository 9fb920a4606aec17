"""A tracker that keeps the held-out success rates in a file of their own."""

from collections.abc import Mapping
from typing import Any, Literal, final

from dteframe import Context, Tracker, TrackerConfig, hookimpl
from dteframe.reports import EvaluationReport


class MyPluginConfig(TrackerConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    file_name: str = "my_plugin.tsv"
    """Name of the file in the run folder."""


@final
class MyPlugin(Tracker):
    """A line per evaluation: step, success rate and standard error."""

    config: MyPluginConfig

    def __init__(self, config: MyPluginConfig, context: Context) -> None:
        """Begin without lines."""
        super().__init__(config, context)
        self._lines: list[str] = []

    @hookimpl
    def dteframe_evaluated(self, step: int, evaluation: EvaluationReport) -> None:
        """Add a line; any other hook of dteframe/hookspecs.py can be a method like this one."""
        self._lines.append(f"{step}\t{evaluation.success_rate}\t{evaluation.standard_error}\n")
        path = self.context.run_folder / self.config.file_name
        path.write_text("".join(self._lines), encoding="utf-8")

    def state_dict(self) -> Mapping[str, Any]:
        """Give the lines: a resumed run writes the file anew, without those after its checkpoint."""
        return {"lines": self._lines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._lines = list(state["lines"])


@hookimpl
def dteframe_components() -> list[type[Tracker]]:
    """Add ``type: my_plugin`` to the trackers."""
    return [MyPlugin]
