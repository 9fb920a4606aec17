"""Questions from files on this machine: JSON lines, JSON, Parquet or CSV."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, final

from pydantic import Field, model_validator

from dteframe import Component, DataError, Dataset, Question, Questions, hookimpl
from dteframe.datasets.columns import ColumnConfig, TableReader, require_columns, written

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")

Row: TypeAlias = Mapping[str, Any]


class Table(NamedTuple):
    """The contents of one file."""

    columns: list[str]
    rows: list[Row]


class FilesConfig(ColumnConfig):
    """Options of ``files``. Relative paths are relative to the folder in which the command runs."""

    type: Literal["files"] = "files"
    path: str | list[str] = Field(min_length=1)
    """One file, a glob like ``data/*.jsonl``, or a list of both; jsonl, json, parquet or csv."""
    evaluation_path: str | list[str] | None = Field(default=None, min_length=1)
    """The same for questions that are held out; null: none of their own."""
    split_column: str | None = None
    """Column that says to which split a row belongs; null: all rows of ``path`` are for training."""
    train_split: str = "train"
    """Value of ``split_column`` in training rows."""
    evaluation_split: str | None = None
    """Value of ``split_column`` in held-out rows; null: none. Rows of other splits are left out."""

    @model_validator(mode="after")
    def _splits_have_one_source(self) -> Self:
        if self.evaluation_split is not None and self.split_column is None:
            raise ValueError("evaluation_split: needs split_column, the column that holds it")
        if self.evaluation_split is not None and self.evaluation_path is not None:
            raise ValueError("evaluation_split and evaluation_path are both given; keep one of them")
        if self.split_column is not None and self.evaluation_split == self.train_split:
            raise ValueError(f"evaluation_split and train_split are both {self.train_split!r}")
        return self

    def columns_by_option(self) -> dict[str, str]:
        """Add the split's column to the others."""
        named = super().columns_by_option()
        return named if self.split_column is None else {**named, "split_column": self.split_column}

    def num_questions(self) -> int | None:
        """Count rows without reading their contents; None if a file is absent or costly to count."""
        if self.keep_rows:
            return None
        try:
            counts = [_count_rows(path, self) for path in find_files(self.path)]
        except (DataError, OSError, ValueError, KeyError):
            return None  # Loading says what is wrong with the file; counting is a courtesy.
        if None in counts:
            return None
        num_rows = sum(count or 0 for count in counts)
        return num_rows if self.sample_size is None else min(num_rows, self.sample_size)

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Say which files are not here."""
        for option, path in (("path", self.path), ("evaluation_path", self.evaluation_path)):
            try:
                find_files(path or [])
            except DataError as error:
                yield option, str(error)

    def has_evaluation_questions(self) -> bool:
        """Whether files or a split for evaluation are given."""
        return self.evaluation_path is not None or self.evaluation_split is not None

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Twelve sums in a file of JSON lines."""
        path = folder / "sums.jsonl"
        sums = [
            {"question": f"{left}+{left + 1}=", "answer": 2 * left + 1, "left": left} for left in range(12)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
        return cls(path=str(path))


@final
class Files(Dataset):
    """Questions from JSON lines, JSON, Parquet or CSV files."""

    config: FilesConfig

    def load(self) -> Questions:
        """Read all files."""
        config = self.config
        train_paths = find_files(config.path)
        evaluation_paths = [] if config.evaluation_path is None else find_files(config.evaluation_path)
        stems = distinct_stems([*train_paths, *evaluation_paths])
        reader = TableReader(config, self.context.warn)
        left_out: Counter[str] = Counter()
        train: list[Question] = []
        evaluation: list[Question] = []
        for path in train_paths:
            table = read_table(path, config)
            for split, rows in _by_split(table, config, path).items():
                if split == config.train_split:
                    train += reader.read(rows, table.columns, str(path), stems[path])
                elif split == config.evaluation_split:
                    evaluation += reader.read(rows, table.columns, str(path), stems[path])
                else:
                    left_out[f"{config.split_column!r} is {split!r}"] += len(rows)
        for path in evaluation_paths:
            table = read_table(path, config)
            evaluation += reader.read(list(enumerate(table.rows)), table.columns, str(path), stems[path])
        self._require_splits(train, evaluation, left_out)
        train = reader.sample(train)
        return Questions(tuple(train), tuple(evaluation), dict(left_out + reader.left_out))

    def _require_splits(
        self, train: Sequence[Question], evaluation: Sequence[Question], left_out: Mapping[str, int]
    ) -> None:
        config = self.config
        wanted = [(train, "train_split", config.train_split)]
        if config.evaluation_split is not None:
            wanted.append((evaluation, "evaluation_split", config.evaluation_split))
        for questions, option, split in wanted:
            if not questions:
                others = (
                    "; ".join(f"{reason} in {count} rows" for reason, count in left_out.items()) or "no other"
                )
                raise DataError(f"{config.path}: {option} {split!r} has no rows ({others})")


def find_files(path: str | Sequence[str]) -> list[Path]:
    """Resolve paths and globs, each glob's files sorted by name.

    Raises:
        DataError: a file is absent, a glob matches nothing, a file occurs twice, or its format is unknown.
    """
    found: list[Path] = []
    for part in (os.path.expanduser(part) for part in ([path] if isinstance(path, str) else path)):
        if glob.has_magic(part) and not Path(part).exists():
            matches = [
                Path(match) for match in sorted(glob.glob(part, recursive=True)) if Path(match).is_file()
            ]
            if not matches:
                raise DataError(f"{part}: no file matches, seen from {Path.cwd()}")
            found += matches
        elif not Path(part).is_file():
            kind = (
                "is a folder; give the files in it, with a glob"
                if Path(part).is_dir()
                else "there is no such file"
            )
            raise DataError(f"{part}: {kind}, seen from {Path.cwd()}")
        else:
            found.append(Path(part))
    for file, times in Counter(found).items():
        if times > 1:
            raise DataError(f"{file}: is given {times} times; give it once")
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{file}: unknown format {file.suffix!r}; the formats are {', '.join(SUFFIXES)}")
    return found


def distinct_stems(paths: Sequence[Path]) -> dict[Path, str]:
    """Name each file for its questions' ids: by its stem, with its folder where two stems are equal."""
    times = Counter(path.stem for path in paths)
    return {path: path.stem if times[path.stem] == 1 else f"{path.parent.name}/{path.stem}" for path in paths}


def read_table(path: Path, config: FilesConfig) -> Table:
    """Read a file of a known format.

    Raises:
        DataError: the file cannot be read; names it, and the line where the format has lines.
    """
    try:
        match path.suffix.lower():
            case ".parquet":
                return _read_parquet(path)
            case ".csv":
                return _read_csv(path, list(config.columns_by_option().values()))
            case ".json":
                return _of_objects(_read_json(path), path)
            case _:
                return _of_objects(_read_json_lines(path), path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}); "
            "save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply to be read; give a list of objects") from error
    except (OSError, ValueError, OverflowError) as error:  # pyarrow's errors are ValueErrors.
        raise DataError(f"{path}: cannot be read as {path.suffix.lower()}: {error}") from error


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    # One file as it is: read_table would also read partitions out of the names of the folders above it.
    table = pyarrow.parquet.ParquetFile(path).read()
    return Table(table.column_names, table.to_pylist())


def _read_csv(path: Path, text_columns: Sequence[str]) -> Table:
    import pyarrow
    import pyarrow.csv

    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        # As they are written: a guessed type would make 7 of the answer 007.
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(text_columns, pyarrow.string())
        ),
    )
    repeated = [name for name, times in Counter(table.column_names).items() if times > 1]
    if repeated:
        raise ValueError(f"its header has the column {repeated[0]!r} twice; rename one of them")
    return Table(table.column_names, table.to_pylist())


def _read_json(path: Path) -> list[tuple[str, Any]]:
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, list):
        raise ValueError(
            f"it holds {type(values).__name__}, not a list of objects; .jsonl is for an object a line"
        )
    return [(f"entry {number}", value) for number, value in enumerate(values)]


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _of_objects(values: Sequence[tuple[str, Any]] | Iterator[tuple[str, Any]], path: Path) -> Table:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for place, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{place} holds {type(value).__name__}, not an object with a key per column")
        columns.update(dict.fromkeys(value))
        rows.append(value)
    if not rows:
        raise DataError(f"{path}: is empty; give a file with at least one question")
    return Table(list(columns), rows)


def _by_split(table: Table, config: FilesConfig, path: Path) -> dict[str, list[tuple[int, Row]]]:
    if config.split_column is None:
        return {config.train_split: list(enumerate(table.rows))}
    require_columns(table.columns, {"split_column": config.split_column}, str(path))
    rows_by_split: dict[str, list[tuple[int, Row]]] = {}
    for number, row in enumerate(table.rows):
        rows_by_split.setdefault(written(row.get(config.split_column)), []).append((number, row))
    return rows_by_split


def _count_rows(path: Path, config: FilesConfig) -> int | None:
    """Count a Parquet file's rows by what it says of itself; text may hold anything until it is read."""
    if path.suffix.lower() != ".parquet":
        return None
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if config.split_column is None:
        return int(file.metadata.num_rows)
    splits = file.read(columns=[config.split_column]).column(config.split_column).to_pylist()
    return sum(written(split) == config.train_split for split in splits)


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [Files]
