"""A dataset of questions and answers in a text file: one per line, separated by a tabulator."""

import hashlib
from pathlib import Path
from typing import Literal, Self, final

from dteframe import DataError, Dataset, DatasetConfig, Question, Questions, hookimpl


class MyPluginConfig(DatasetConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    path: str
    """The file; UTF-8, a question, a tabulator and an answer on each line."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Write a file of three questions: what ``dteframe check`` reads."""
        path = folder / "questions.tsv"
        path.write_text("1+1=\t2\n1+2=\t3\n1+3=\t4\n", encoding="utf-8")
        return cls(path=str(path))


@final
class MyPlugin(Dataset):
    """Questions and answers from a text file."""

    config: MyPluginConfig

    def load(self) -> Questions:
        """Read the file; a question's id is the hash of its line, so that it survives a new order."""
        try:
            lines = Path(self.config.path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.config.path}: cannot be read: {error}; give a text file") from error
        questions = {}
        unusable = 0
        for line in lines:
            text, _, answer = line.partition("\t")
            if text.strip() and answer.strip():
                name = hashlib.sha256(line.encode()).hexdigest()[:12]
                questions[name] = Question(id=name, text=text, prompt=text, answer=answer)
            else:
                unusable += 1
        if not questions:
            raise DataError(f"{self.config.path}: has no line with a question, a tabulator and an answer")
        left_out = {"line without a question or an answer": unusable} if unusable else {}
        return Questions(tuple(questions.values()), left_out=left_out)


@hookimpl
def dteframe_components() -> list[type[Dataset]]:
    """Add ``dataset.type=my_plugin``."""
    return [MyPlugin]
