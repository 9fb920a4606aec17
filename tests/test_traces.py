"""Traces: what is read, what is refused, and that runs write them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dteframe import DataError
from dteframe.traces import read_trace, trace_of_rows, write_trace


def table(**columns):
    return {
        "question_id": ["b", "a", "b"],
        "policy_version": [7, 0, 2],
        "successes": [8, 0, 3],
        "trials": [8, 8, 4],
    } | columns


def test_rows_are_sorted_by_time_and_questions_stay_in_the_files_order():
    trace = trace_of_rows(table(text=["two", "one", "two"]), "here")
    assert trace.question_ids == ("b", "a")
    assert trace.texts == ("two", "one")
    assert trace.question.tolist() == [1, 0, 0]
    assert trace.policy_version.tolist() == [0, 2, 7]
    assert trace.successes.tolist() == [0, 3, 8]
    assert trace.purposes == ("train", "train", "train")


def test_what_is_written_is_read_again(tmp_path):
    trace = trace_of_rows(table(text=["zwölf", "one", "zwölf"], level=[3, None, 3]), "here")
    write_trace(trace, tmp_path / "trace.parquet")
    again = read_trace(tmp_path)
    assert sorted(again.question_ids) == ["a", "b"]
    assert again.columns[again.question_ids.index("b")] == {"level": 3}
    names = [again.question_ids[place] for place in again.question]
    assert list(zip(names, again.successes.tolist(), again.trials.tolist(), strict=True)) == [
        ("a", 0, 8),
        ("b", 3, 4),
        ("b", 8, 8),
    ]
    assert again.texts[again.question_ids.index("b")] == "zwölf"


def test_missing_columns_are_named():
    with pytest.raises(DataError) as error:
        trace_of_rows({"question": ["q"], "rate": [0.5]}, "t.parquet")
    assert str(error.value) == (
        "t.parquet: lacks the columns question_id, policy_version, successes, trials of a trace; has "
        "question, rate"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"trials": [8, 0, 4]}, "here: row 1 (question 'a') has 0 successes in 0 trials; needs"),
        ({"successes": [9, 0, 3]}, "here: row 0 (question 'b') has 9 successes in 8 trials; needs"),
        ({"successes": [8, 0, 0.5]}, "here: row 2 has successes 0.5; must be a whole number (counts, not"),
        ({"successes": [8, 0, float("nan")]}, "here: row 2 has successes nan; must be a whole number"),
        ({"successes": [8, None, 3]}, "here: row 1 has successes None; must be a whole number"),
        (
            {"purpose": ["train", "test", "train"]},
            "here: row 1 has the purpose 'test'; must be one of train,",
        ),
    ],
)
def test_impossible_rows_are_refused(columns, message):
    with pytest.raises(DataError) as error:
        trace_of_rows(table(**columns), "here")
    assert str(error.value).startswith(message)


def test_files_that_are_no_tables_are_refused(tmp_path):
    (tmp_path / "broken.parquet").write_text("hello")
    with pytest.raises(DataError, match="neither parquet nor JSON lines"):
        read_trace(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="no such file"):
        read_trace(tmp_path / "missing.parquet")
    with pytest.raises(DataError, match=r"holds neither trace\.parquet nor trace\.jsonl"):
        read_trace(tmp_path)


def test_json_lines_are_read_as_well(tmp_path):
    rows = [{"question_id": "q", "policy_version": v, "successes": v, "trials": 4} for v in (1, 0)]
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    np.testing.assert_array_equal(read_trace(tmp_path).successes, [0, 1])
