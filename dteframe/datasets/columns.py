"""Turn rows of a table into questions: which column is what, how the prompt is worded, what is left out."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from dteframe import DataError, DatasetConfig, Message, Question
from dteframe.answer_pattern import AnswerPattern, last_answer
from dteframe.records import JsonValue

MOST_NAMED = 5
"""Rows that a message names; the rest it counts."""


class PromptConfig(DatasetConfig):
    """Options of every dataset that words its prompts itself."""

    prompt_template: str = "{question}"
    """What the policy is asked; ``{question}`` is replaced by the question's text, nothing else is."""
    system_prompt: str | None = None
    """Instruction before the prompt: a system message, or with ``chat: false`` a paragraph of its own."""
    chat: bool = False
    """Give chat messages for the tokenizer's template (true) or plain text (false)."""

    @field_validator("prompt_template")
    @classmethod
    def _holds_the_question(cls, template: str) -> str:
        if "{question}" not in template:
            raise ValueError(f"{template!r} lacks '{{question}}'; put it where the question's text belongs")
        return template

    def prompt(self, text: str) -> str | tuple[Message, ...]:
        """Word the prompt of a question."""
        asked = self.prompt_template.replace("{question}", text)
        if not self.chat:
            return asked if self.system_prompt is None else f"{self.system_prompt}\n\n{asked}"
        user = {"role": "user", "content": asked}
        return (
            (user,)
            if self.system_prompt is None
            else ({"role": "system", "content": self.system_prompt}, user)
        )


class ColumnConfig(PromptConfig):
    """Options of every dataset that is a table."""

    question_column: str = "question"
    """Column of the question's text; dots lead into a column of records: ``info.question``."""
    answer_column: str = "answer"
    """Column of the gold answer: text or a number."""
    solution_column: str | None = None
    """Column of a worked solution, for models that are warmed up on it; null: there is none."""
    id_column: str | None = None
    """Column of a unique name of the row; null: the table's name and the row's number, ``train-17``."""
    answer_pattern: AnswerPattern | None = None
    r"""Regular expression whose only group is the gold answer inside the answer column: ``#### (.*)``."""

    keep_rows: dict[str, list[str | int]] = {}
    """Rows to read, by a column: ``{level: [3, 4, 5]}``; the others are counted and left out."""
    sample_size: int | None = Field(default=None, ge=1)
    """Train on so many of the questions, the same ones whatever the seed; null: on all."""

    @model_validator(mode="after")
    def _question_is_not_the_answer(self) -> Self:
        if self.question_column == self.answer_column:
            raise ValueError(f"question_column and answer_column are both {self.question_column!r}")
        return self

    def columns_by_option(self) -> dict[str, str]:
        """Give the columns that must exist, by the option that names them."""
        named = {
            "question_column": self.question_column,
            "answer_column": self.answer_column,
            "solution_column": self.solution_column,
            "id_column": self.id_column,
            **{f"keep_rows.{column}": column for column in self.keep_rows},
        }
        return {option: column for option, column in named.items() if column is not None}


class TableReader:
    """Collects the questions of one dataset from its tables, and counts what is left out."""

    def __init__(self, config: ColumnConfig, warn: Callable[[str], None]) -> None:
        """Start with nothing read."""
        self.left_out: Counter[str] = Counter()
        self._config = config
        self._warn = warn
        self._pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
        self._origins: dict[str, str] = {}

    def read(
        self, rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Sequence[str], where: str, stem: str
    ) -> list[Question]:
        """Turn numbered rows into questions.

        Args:
            rows: each with the number that it has in the table, whatever was filtered out before.
            columns: the columns that the table has.
            where: the table's name in messages: its path, or hub id and split.
            stem: first part of the ids where no column gives them.

        Raises:
            DataError: a column is missing, an id occurs twice, or no row could be used.
        """
        require_columns(columns, self._config.columns_by_option(), where)
        questions: list[Question] = []
        unusable: dict[str, list[str]] = {}
        odd_columns: Counter[str] = Counter()
        for number, row in rows:
            other = self._unwanted(row)
            if other is not None:
                self.left_out[other] += 1
                continue
            question_id = self._id(row, f"{stem}-{number}", where, number)
            answer = self._answer(row)
            text = written(cell(row, self._config.question_column)).strip()
            if not text or not answer:
                unusable.setdefault(self._reason(row, text), []).append(question_id)
                continue
            questions.append(self._question(question_id, text, answer, row, odd_columns))
        self._tell(unusable, odd_columns, where)
        if not questions:
            counted = ", ".join(f"{count} because {reason}" for reason, count in self.left_out.items())
            raise DataError(
                f"{where}: no row can be used" + (f", left out: {counted}" if counted else "; it is empty")
            )
        return questions

    def sample(self, questions: list[Question]) -> list[Question]:
        """Draw ``sample_size`` questions by a hash of their ids; they stay in their order."""
        size = self._config.sample_size
        if size is None or size >= len(questions):
            return questions
        ranked = sorted(questions, key=lambda one: hashlib.sha256(one.id.encode()).digest())
        drawn = {question.id for question in ranked[:size]}
        self.left_out[f"not among the {size} of sample_size"] += len(questions) - size
        return [question for question in questions if question.id in drawn]

    def _unwanted(self, row: Mapping[str, Any]) -> str | None:
        """Say why a row is not one of ``keep_rows``, if it is not."""
        for column, values in self._config.keep_rows.items():
            if written(cell(row, column)).strip() not in {str(value) for value in values}:
                return f"{column!r} is not one of keep_rows"
        return None

    def _id(self, row: Mapping[str, Any], default: str, where: str, number: int) -> str:
        column = self._config.id_column
        question_id = default if column is None else written(cell(row, column)).strip()
        here = f"{where}, row {number}"
        if not question_id:
            raise DataError(f"{here}: id_column {column!r} is empty; fill it, or set id_column: null")
        if question_id in self._origins:
            raise DataError(
                f"{here}: id {question_id!r} occurs already in {self._origins[question_id]}; "
                + (
                    "rename one of the files"
                    if column is None
                    else f"make {column!r} unique, or set id_column: null"
                )
            )
        self._origins[question_id] = here
        return question_id

    def _answer(self, row: Mapping[str, Any]) -> str:
        answer = written(cell(row, self._config.answer_column)).strip()
        if self._pattern is None or not answer:
            return answer
        return (last_answer(self._pattern, answer) or "").strip()

    def _reason(self, row: Mapping[str, Any], text: str) -> str:
        column = self._config.answer_column if text else self._config.question_column
        value = cell(row, column)
        if written(value).strip():
            return f"{column!r} does not match answer_pattern {self._config.answer_pattern!r}"
        if value is None or isinstance(value, str | float):
            return f"{column!r} is empty"
        return f"{column!r} holds {type(value).__name__}, not text or a number"

    def _question(
        self, question_id: str, text: str, answer: str, row: Mapping[str, Any], odd_columns: Counter[str]
    ) -> Question:
        used = set(self._config.columns_by_option().values())
        further: dict[str, JsonValue] = {}
        for name, value in row.items():
            if name in used:
                continue
            try:
                further[name] = json_value(value)
            except TypeError:
                odd_columns[name] += 1
        solution_column = self._config.solution_column
        solution = "" if solution_column is None else written(cell(row, solution_column)).strip()
        return Question(question_id, text, self._config.prompt(text), answer, solution or None, further)

    def _tell(
        self, unusable: Mapping[str, Sequence[str]], odd_columns: Mapping[str, int], where: str
    ) -> None:
        for reason, ids in unusable.items():
            self.left_out[reason] += len(ids)
            named = ", ".join(repr(name) for name in ids[:MOST_NAMED]) + (
                ", ..." if len(ids) > MOST_NAMED else ""
            )
            self._warn(f"{where}: {len(ids)} rows are left out because {reason}: {named}")
        for name, times in odd_columns.items():
            self._warn(f"{where}: column {name!r} is left out of {times} rows: its values are no JSON")


def require_columns(columns: Sequence[str], wanted: Mapping[str, str], where: str) -> None:
    """Check that the table has every column that an option names.

    Raises:
        DataError: names all that are missing, the nearest of those that exist, and those that exist.
    """
    missing = []
    for option, column in wanted.items():
        if column not in columns and column.partition(".")[0] not in columns:
            nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            missing.append(f"{option} {column!r} is missing{hint}")
    if missing:
        existing = ", ".join(repr(column) for column in columns) or "none"
        raise DataError(f"{where}: {'; '.join(missing)}; its columns are {existing}")


def cell(row: Mapping[str, Any], column: str) -> Any:
    """Give the value of a column, or of a record's field that ``column`` leads to; None if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def written(value: object) -> str:
    """Write a cell as text: nothing, not-a-number and lists as empty, a whole float without its ``.0``."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, bytes | Mapping | list | tuple):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def json_value(value: Any) -> JsonValue:
    """Give a cell as JSON: dates as ISO text, not-a-number and infinities as null, arrays as lists.

    Raises:
        TypeError: it cannot be written as JSON: bytes, images, objects.
    """
    import datetime
    import decimal

    import numpy as np

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case decimal.Decimal():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case np.ndarray() | np.generic():
            return json_value(value.tolist())
        case Mapping():
            return {str(key): json_value(part) for key, part in value.items()}
        case list() | tuple():
            return [json_value(part) for part in value]
    raise TypeError(f"{type(value).__name__} is no JSON value")
