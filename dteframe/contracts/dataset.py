"""Datasets: what can be asked?"""

from __future__ import annotations

from abc import abstractmethod

from dteframe.contracts.component import Component, PluginConfig
from dteframe.records import Questions


class DatasetConfig(PluginConfig):
    """Options that every dataset has."""

    def num_questions(self) -> int | None:
        """Count the training questions, held-out ones included, or give None where only loading tells."""
        return None

    def has_evaluation_questions(self) -> bool:
        """Whether ``load`` will give evaluation questions of its own, so that none are held out."""
        return False


class Dataset(Component):
    """What can be asked?"""

    kind = "dataset"
    config: DatasetConfig

    @abstractmethod
    def load(self) -> Questions:
        """Read all questions; the engine removes duplicates of equal text and holds questions out.

        Raises:
            DataError: the source cannot be read, is empty, or lacks a column; the message names the file
            and the column.
        """
