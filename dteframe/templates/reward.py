"""A reward for answers that end in the gold answer."""

from collections.abc import Sequence
from typing import Literal, final

from dteframe import Completion, Question, Reward, RewardConfig, hookimpl


class MyPluginConfig(RewardConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    ignore_case: bool = True
    """Whether capital and small letters count as the same."""


@final
class MyPlugin(Reward):
    """1 if the completion ends in the gold answer, else 0."""

    config: MyPluginConfig

    def score(self, question: Question, completions: Sequence[Completion]) -> Sequence[float]:
        """Compare the ends of the texts."""
        answer = self._plain(question.answer)
        return [float(self._plain(completion.text).endswith(answer)) for completion in completions]

    def problem_with(self, question: Question) -> str | None:
        """Refuse questions without an answer: every completion ends in the empty text."""
        return None if question.answer.strip() else "the answer is empty"

    def _plain(self, text: str) -> str:
        stripped = text.strip()
        return stripped.casefold() if self.config.ignore_case else stripped


@hookimpl
def dteframe_components() -> list[type[Reward]]:
    """Add ``type: my_plugin`` to the rewards."""
    return [MyPlugin]
