"""Mutate data files and read each: it is read, or refused by a sentence that names the file.

``python tests/faults/mutate_data.py --count 1000`` prints the counts, and every surprise with its seed.
Datasets (csv, json, jsonl, parquet), traces (jsonl, parquet, and the published tables) and adapters.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from verdicts import Verdict, judge_many, verdict

from dteframe import DataError
from dteframe.contracts import Context
from dteframe.datasets.files import Files, FilesConfig
from dteframe.engine import calls
from dteframe.estimators.adapter import AdapterShape, build_adapter, load_adapter, save_adapter
from dteframe.experiments.published_traces import read_any_trace

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63 - 1, -(2**63), 10**40, float("nan"), float("inf"), -0.0),
    *("", " ", "a", "\0", "\ud800", "é" * 1000, "1", "nan", "train", "{}", "=1+1", '"', "a,b", "a\nb"),
    *([], {}, [1, [2]], {"a": {"b": None}}, [None], ["x", 1], {"": ""}),
)
ARROW_TYPES = (
    *(
        pa.int64(),
        pa.int8(),
        pa.uint64(),
        pa.float64(),
        pa.float16(),
        pa.bool_(),
        pa.string(),
        pa.large_string(),
    ),
    *(pa.binary(), pa.null(), pa.date32(), pa.timestamp("ns"), pa.decimal128(38, 10), pa.list_(pa.float64())),
    *(
        pa.duration("s"),
        pa.time64("us"),
        pa.struct([("a", pa.int64())]),
        pa.dictionary(pa.int8(), pa.string()),
    ),
)


def _questions() -> list[dict[str, Any]]:
    return [{"question": f"{left}+1=", "answer": left + 1, "level": "ab"[left % 2]} for left in range(20)]


def _trace() -> list[dict[str, Any]]:
    return [
        {"question_id": f"q{row % 7}", "text": f"{row}?", "policy_version": row, "purpose": "train"}
        | {"successes": row % 5, "trials": 4}
        for row in range(20)
    ]


def _visits() -> list[dict[str, Any]]:
    return [{"question": f"{row}?", "acc_by_visit": [0.125 * row, 0.5]} for row in range(8)]


def _solve_rates() -> list[dict[str, Any]]:
    return [{"question": f"{row}?", "solve_rate": row / 8, "n_rollouts": 8} for row in range(8)]


def _models() -> list[dict[str, Any]]:
    return [{"question": f"{row}?", "gold_solution": "x", "gpt": row % 2, "qwen": -1} for row in range(8)]


def _read_questions(path: Path) -> None:
    context = Context(path.parent, path.parent, "cpu", 0, lambda *_: None, lambda _: None)
    config = FilesConfig(path=str(path))
    config.num_questions()
    calls.load(Files(config, context))


TABLES: Mapping[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[Path], object], tuple[str, ...]]] = {
    "dataset": (_questions, _read_questions, (".csv", ".json", ".jsonl", ".parquet")),
    "trace": (_trace, read_any_trace, (".jsonl", ".parquet")),
    "visits": (_visits, read_any_trace, (".parquet",)),
    "solve_rates": (_solve_rates, read_any_trace, (".parquet",)),
    "models": (_models, read_any_trace, (".parquet",)),
}
"""Rows that are sound, what reads them, and as which files."""


def outcome_of(path: Path, read: Callable[[Path], object]) -> Verdict:
    """Read a file, and judge what comes of it."""
    began = time.process_time()
    kind, message = "read", ""
    try:
        read(path)
    except DataError as error:
        kind, message = "refused", str(error)
        if str(path) not in message:
            kind, message = "surprise", f"without the file's name: {message}"
    except Exception:  # noqa: BLE001  # that is what is looked for
        kind, message = "surprise", traceback.format_exc()
    return verdict(kind, time.process_time() - began, message)


def outcomes(seeds: range, folder: Path) -> Iterator[tuple[int, str, Verdict]]:
    """Judge a file per seed; that of a surprise stays in ``folder``."""
    adapter = folder / "adapter.safetensors"
    save_adapter(build_adapter(AdapterShape("e", 8, hidden_width=4, num_layers=2)), adapter)
    for seed in seeds:
        rng = random.Random(seed)
        what = rng.choice(("dataset", "dataset", "dataset", "trace", "trace", "adapter", *TABLES))
        if what == "adapter":
            path, read = folder / f"mutated_{seed}.safetensors", load_adapter
            path.write_bytes(_mutated_adapter(rng, adapter.read_bytes()))
        else:
            rows, read, suffixes = TABLES[what]
            path = folder / f"mutated_{seed}{rng.choice(suffixes)}"
            _write_mutated(rng, rows(), path)
        found = outcome_of(path, read)
        if found.kind != "surprise":
            path.unlink()
        yield seed, f"{what}, {path}", found


def _write_mutated(rng: random.Random, rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of which some are wrong, or sound ones as a file that is broken."""
    breaks_values = rng.random() < 0.6
    if breaks_values:
        for _ in range(rng.choice((1, 1, 3, 20))):
            _change_a_row(rng, rows)
    _write(rng, rows, path, breaks_values)
    if not breaks_values or rng.random() < 0.2:
        path.write_bytes(_mutated_bytes(rng, path.read_bytes()))


def _change_a_row(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    row = rng.choice(rows)
    key = rng.choice([*row, "new", ""])
    match rng.randrange(5):
        case 0:
            row.pop(key, None)
        case 1:
            for each in rows:
                each[key] = rng.choice(VALUES)
        case 2:
            for each in rows:
                each.pop(key, None)
        case _:
            row[key] = rng.choice(VALUES)


def _write(rng: random.Random, rows: list[dict[str, Any]], path: Path, breaks_values: bool) -> None:
    match path.suffix:
        case ".csv":
            names = list(rows[0]) or ["a"]
            lines = [names, *([row.get(name) for name in names] for row in rows)]
            text = "\n".join(",".join(_csv_cell(cell) for cell in line) for line in lines)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        case ".json":
            whole: Any = (
                rng.choice((rows[0], {"data": rows}, rows[0].get("question"))) if rng.random() < 0.1 else rows
            )
            path.write_text(json.dumps(whole))
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        case ".parquet":
            table = _arrow_table(rng, rows, breaks_values)
            try:
                pa.parquet.write_table(table, path)
            except (pa.ArrowException, UnicodeError):  # Parquet has no such type; text is then written.
                path.write_bytes(repr(rows).encode("utf-8", "surrogatepass"))


def _csv_cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') else text


def _arrow_table(rng: random.Random, rows: list[dict[str, Any]], breaks_values: bool) -> pa.Table:
    """Make a table, one column of which may have another type, or the name of another."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["a"]
    odd = rng.choice(names) if breaks_values else None
    arrays = [_arrow_array([row.get(name) for row in rows], rng.choice(ARROW_TYPES) if name == odd else None)
              for name in names]  # fmt: skip
    if breaks_values and rng.random() < 0.1:
        names[rng.randrange(len(names))] = rng.choice(names)
    return pa.table(arrays, names=names)


def _arrow_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    for attempt in (kind, None, pa.string()):
        try:
            return pa.array(values if attempt != pa.string() else [ascii(value) for value in values], attempt)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    return pa.nulls(len(values), kind or pa.null())


def _mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or overwrite bytes, whatever they mean."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 4, 64))
        match rng.randrange(6):
            case 0:
                data = data[:place]
            case 1:
                data = data[:place] + rng.randbytes(size) + data[place + size :]
            case 2:
                data = data[:place] + rng.randbytes(size) + data[place:]
            case 3:
                flipped = bytes([data[place] ^ (1 << rng.randrange(8))]) if data[place:] else b""
                data = data[:place] + flipped + data[place + 1 :]
            case 4:
                data = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 16, b"\n", b"[" * 100_000)) + data
            case _:
                data = data[:place] + data[place + size :]
    return data if rng.random() > 0.02 else b""


def _mutated_adapter(rng: random.Random, data: bytes) -> bytes:
    """Break the header of a safetensors file in its own terms, or the file."""
    if rng.random() < 0.3:
        return _mutated_bytes(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    written = json.loads(header["__metadata__"]["dteframe_adapter"])
    shape = written["shape"]
    name = rng.choice([key for key in header if key != "__metadata__"])
    number = rng.choice((0, -1, 1, 10**6, 2**40, 2**63, 1.5, None, "8", [], True))
    match rng.randrange(7):
        case 0:
            shape[rng.choice([*shape, "new"])] = number
        case 1:
            shape.pop(rng.choice(list(shape)))
        case 2:
            header[name]["shape"] = rng.choice(([], [number], [2**32, 2**32], [1, 2, 3], None))
        case 3:
            header[name]["dtype"] = rng.choice(("F64", "I8", "BOOL", "X", None, "F8_E4M3"))
        case 4:
            header[name]["data_offsets"] = rng.choice(([0, 0], [0, 2**60], [8, 4], [-1, 4], None))
        case 5:
            header[_new_name(rng, name)] = header.pop(name)
        case _:
            rest = _mutated_floats(rng, rest)
    header["__metadata__"]["dteframe_adapter"] = rng.choice(
        (json.dumps(written),) * 9 + ("{", "[]", "null", "", json.dumps({"shape": None}))
    )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _new_name(rng: random.Random, name: str) -> str:
    return rng.choice((name + "x", name.rpartition(".")[0], "", "query", "easiness.x"))


def _mutated_floats(rng: random.Random, data: bytes) -> bytes:
    place = 4 * rng.randrange(len(data) // 4)
    return (
        data[:place] + struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38))) + data[place + 4 :]
    )


def main() -> None:
    """Judge as many files as asked for, and print what came of them."""
    folder = Path(tempfile.mkdtemp(prefix="mutated_data_"))
    judge_many(__doc__.splitlines()[0], "files", 1000, lambda seeds: outcomes(seeds, folder))


if __name__ == "__main__":
    main()
