"""Questions through Hugging Face ``datasets``: from the hub or from a folder on this machine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field

from dteframe import Component, DataError, Dataset, Question, Questions, hookimpl
from dteframe.datasets.columns import ColumnConfig, TableReader

if TYPE_CHECKING:
    from datasets import Dataset as Table


class HuggingFaceConfig(ColumnConfig):
    """Options of ``huggingface``."""

    type: Literal["huggingface"] = "huggingface"
    path: str = Field(min_length=1)
    """Hub id (``openai/gsm8k``), folder made by ``save_to_disk``, or folder of data files."""
    config_name: str | None = None
    """Subset of the dataset, for those that have several (``main``); null: its only or default one."""
    revision: str | None = None
    """Commit, tag or branch on the hub; give a commit for a run that can be repeated."""
    split: str = Field(default="train", min_length=1)
    """Split to train on; from the hub also a slice of it: ``train[:1000]``."""
    evaluation_split: str | None = Field(default=None, min_length=1)
    """Split that is held out; null: the engine holds some training questions out."""

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Say that a folder is not here, where the path cannot be a hub id."""
        if self.path.startswith((".", "/", "~")) and not Path(self.path).expanduser().exists():
            yield "path", f"there is no folder {self.path!r} here; a hub id is written owner/name"

    def has_evaluation_questions(self) -> bool:
        """Whether a split for evaluation is given."""
        return self.evaluation_split is not None

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Twelve sums in a folder with one file of JSON lines."""
        sums = [{"question": f"{left}+{left + 1}=", "answer": str(2 * left + 1)} for left in range(12)]
        data = folder / "sums"
        data.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in sums)
        (data / "train.jsonl").write_text(lines, encoding="utf-8")
        return cls(path=str(data))


@final
class HuggingFace(Dataset):
    """Questions from a dataset on the Hugging Face hub or in a local folder."""

    config: HuggingFaceConfig

    def load(self) -> Questions:
        """Read the split, and the evaluation split if there is one; from the hub on the first use."""
        reader = TableReader(self.config, self.context.warn)
        train = reader.sample(self._read(reader, self.config.split, "split"))
        evaluation: list[Question] = []
        if self.config.evaluation_split is not None:
            evaluation = self._read(reader, self.config.evaluation_split, "evaluation_split")
        return Questions(tuple(train), tuple(evaluation), dict(reader.left_out))

    def _read(self, reader: TableReader, split: str, option: str) -> list[Question]:
        table = self._load_split(split, option)
        rows = ((number, dict(row)) for number, row in enumerate(table))
        return reader.read(rows, table.column_names, f"{self.config.path}, {option} {split!r}", split)

    def _load_split(self, split: str, option: str) -> Table:
        folder = Path(self.config.path).expanduser()
        if folder.is_file():
            raise DataError(
                f"{folder}: is a file; dataset type 'files' reads it, 'huggingface' wants a folder or hub id"
            )
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return self._load_saved(folder, split, option)
        return self._load_from_hub_or_files(folder, split, option)

    def _load_saved(self, folder: Path, split: str, option: str) -> Table:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: cannot be read as a folder of save_to_disk: {error}") from error
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise DataError(f"{folder}: {option} {split!r} is missing{_nearest(split, list(splits))}")
        return splits[split]

    def _load_from_hub_or_files(self, folder: Path, split: str, option: str) -> Table:
        import datasets

        config = self.config
        is_local = folder.is_dir()
        try:
            return datasets.load_dataset(
                str(folder) if is_local else config.path,
                name=config.config_name,
                revision=config.revision,
                split=split,
                # What a folder here is made into belongs to this run's cache; downloads to everybody's.
                cache_dir=str(self.context.cache_folder / "datasets") if is_local else None,
            )
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            # RuntimeError: the dataset is a script, which is never run.
            source = "this folder" if is_local else "the hub (no such folder is here)"
            reason = str(error).rstrip(".")
            raise DataError(
                f"{config.path}: {option} {split!r} cannot be loaded from {source}: {reason}"
            ) from error


def _nearest(name: str, existing: list[str]) -> str:
    nearest = difflib.get_close_matches(name, existing, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{hint}; its splits are {', '.join(repr(split) for split in existing)}"


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [HuggingFace]
