import datetime
import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dteframe import Context, DataError
from dteframe.datasets.files import Files, FilesConfig
from dteframe.datasets.huggingface import HuggingFace, HuggingFaceConfig
from dteframe.datasets.reasoning_gym import ReasoningGym, ReasoningGymConfig, TaskConfig
from dteframe.gym_entries import from_json, to_json
from dteframe.gym_short import SHORT_FORMS

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"question": f"{left}+1=", "answer": left + 1, "level": left} for left in range(4)]


class Told(list[str]):
    """The warnings that a component gave, with the context that collects them."""

    def context(self, folder: Path) -> Context:
        return Context(folder, folder, "cpu", 0, lambda what, done, total: None, self.append)


@pytest.fixture
def told() -> Told:
    return Told()


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(config: FilesConfig, told: Told, folder: Path):
    return Files(config, told.context(folder)).load()


# files


def test_all_four_formats_give_the_same_questions(tmp_path, told):
    write_lines(tmp_path / "a" / "sums.jsonl", ROWS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "sums.json").write_text(json.dumps(ROWS))
    (tmp_path / "c").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c" / "sums.parquet")
    (tmp_path / "d").mkdir()
    lines = [f"{row['question']},{row['answer']},{row['level']}\n" for row in ROWS]
    (tmp_path / "d" / "sums.csv").write_text("question,answer,level\n" + "".join(lines))
    loaded = [
        load(FilesConfig(path=str(path)), told, tmp_path).train for path in sorted(tmp_path.glob("?/sums.*"))
    ]
    assert len(loaded) == 4
    assert all(questions == loaded[0] for questions in loaded)
    first = loaded[0][0]
    assert (first.id, first.text, first.prompt, first.answer, first.solution, first.columns) == (
        "sums-0",
        "0+1=",
        "0+1=",
        "1",
        None,
        {"level": 0},
    )
    assert told == []


def test_columns_are_those_that_the_options_name(tmp_path, told):
    rows = [{"q": "2+2", "a": "so #### 4", "s": "2+2 is 4", "name": "x7", "when": "now"}]
    config = FilesConfig(
        path=write_lines(tmp_path / "x.jsonl", rows),
        question_column="q",
        answer_column="a",
        solution_column="s",
        id_column="name",
        answer_pattern="#### (.*)",
    )
    (question,) = load(config, told, tmp_path).train
    assert (question.id, question.text, question.answer, question.solution, question.columns) == (
        "x7",
        "2+2",
        "4",
        "2+2 is 4",
        {"when": "now"},
    )


def test_a_column_inside_records_is_reached_by_dots(tmp_path, told):
    """The shape of Open-Reasoner-Zero's 57k questions: a row is a list of two records."""
    rows = [
        [{"from": "human", "value": "1+1="}, {"from": "assistant", "ground_truth": {"value": "2"}}],
        [{"from": "human", "value": "1+2="}, {"from": "assistant", "ground_truth": {"value": "3"}}],
    ]
    (tmp_path / "orz").mkdir()
    (tmp_path / "orz" / "rows.json").write_text(json.dumps(rows))
    config = HuggingFaceConfig(
        path=str(tmp_path / "orz"), question_column="0.value", answer_column="1.ground_truth.value"
    )
    found = HuggingFace(config, told.context(tmp_path)).load().train
    assert [(question.text, question.answer) for question in found] == [("1+1=", "2"), ("1+2=", "3")]
    odd = config.model_copy(update={"answer_column": "1.truth"})
    with pytest.raises(DataError, match="no row can be used, left out: 2 because '1.truth' is empty"):
        HuggingFace(odd, told.context(tmp_path)).load()
    absent = config.model_copy(update={"answer_column": "2.value"})
    with pytest.raises(DataError, match=r"answer_column '2.value' is missing; its columns are '0', '1'"):
        HuggingFace(absent, told.context(tmp_path)).load()


def test_rows_to_keep_are_chosen_by_a_column_and_the_others_counted(tmp_path, told):
    path = write_lines(tmp_path / "sums.jsonl", ROWS)
    config = FilesConfig(path=path, keep_rows={"level": [1, "3"]})
    found = load(config, told, tmp_path)
    assert [question.id for question in found.train] == ["sums-1", "sums-3"]
    assert found.left_out == {"'level' is not one of keep_rows": 2}
    assert told == []
    with pytest.raises(DataError, match="no row can be used, left out: 4 because 'level' is not one of keep"):
        load(FilesConfig(path=path, keep_rows={"level": [9]}), told, tmp_path)
    with pytest.raises(DataError, match=r"keep_rows.levle 'levle' is missing \(did you mean 'level'\?\)"):
        load(FilesConfig(path=path, keep_rows={"levle": [1]}), told, tmp_path)


def test_a_sample_is_always_the_same_and_keeps_its_order(tmp_path, told):
    rows = [{"question": f"{left}+1=", "answer": left + 1} for left in range(100)]
    path = write_lines(tmp_path / "sums.jsonl", rows)
    config = FilesConfig(path=path, sample_size=10)
    found = load(config, told, tmp_path)
    numbers = [int(question.id.removeprefix("sums-")) for question in found.train]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10 and numbers != list(range(10))
    assert found.left_out == {"not among the 10 of sample_size": 90}
    assert load(config, told, tmp_path).train == found.train
    larger = load(FilesConfig(path=path, sample_size=20), told, tmp_path)
    assert all(question in larger.train for question in found.train)
    assert len(load(FilesConfig(path=path, sample_size=200), told, tmp_path).train) == 100


def test_counting_without_reading_knows_of_samples_but_not_of_rows_to_keep(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    path = str(tmp_path / "sums.parquet")
    assert FilesConfig(path=path, sample_size=3).num_questions() == 3
    assert FilesConfig(path=path, sample_size=9).num_questions() == 4
    assert FilesConfig(path=path, keep_rows={"level": [1]}).num_questions() is None


def test_the_last_match_of_the_pattern_is_the_gold_answer_as_in_rewards(tmp_path, told):
    rows = [{"question": "2*3+1", "answer": "2*3 is 6, 6+1 is 7"}]
    config = FilesConfig(path=write_lines(tmp_path / "x.jsonl", rows), answer_pattern="([0-9]+)")
    assert load(config, told, tmp_path).train[0].answer == "7"


def test_a_csv_answer_stays_as_it_is_written(tmp_path, told):
    (tmp_path / "x.csv").write_text('question,answer\n"two\nlines",007\n')
    (question,) = load(FilesConfig(path=str(tmp_path / "x.csv")), told, tmp_path).train
    assert (question.text, question.answer) == ("two\nlines", "007")


def test_rows_that_cannot_be_used_are_counted_and_named_and_the_others_keep_their_ids(tmp_path, told):
    rows = [
        {"question": "a", "answer": "#### 1"},
        {"question": " ", "answer": "#### 1"},
        {"question": "b", "answer": None},
        {"question": "c", "answer": "1"},
        {"question": "d", "answer": "#### 2"},
        {"question": "e", "answer": ["#### 2"]},
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    questions = load(FilesConfig(path=path, answer_pattern="#### (.*)"), told, tmp_path)
    assert [question.id for question in questions.train] == ["x-0", "x-4"]
    assert questions.left_out == {
        "'question' is empty": 1,
        "'answer' is empty": 1,
        "'answer' does not match answer_pattern '#### (.*)'": 1,
        "'answer' holds list, not text or a number": 1,
    }
    assert told[-2] == (
        f"{path}: 1 rows are left out because 'answer' does not match answer_pattern '#### (.*)': 'x-3'"
    )


def test_splits_by_a_column_or_by_a_path_keep_evaluation_apart(tmp_path, told):
    rows = [{**row, "split": "test" if row["level"] == 3 else "train"} for row in ROWS]
    rows.append({"question": "odd", "answer": 1, "split": "other"})
    path = write_lines(tmp_path / "x.jsonl", rows)
    config = FilesConfig(path=path, split_column="split", evaluation_split="test")
    questions = load(config, told, tmp_path)
    assert [question.id for question in questions.train] == ["x-0", "x-1", "x-2"]
    assert [question.id for question in questions.evaluation] == ["x-3"]
    assert questions.left_out == {"'split' is 'other'": 1}
    evaluation_path = write_lines(tmp_path / "held" / "x.jsonl", ROWS[3:])
    config = FilesConfig(path=write_lines(tmp_path / "x.jsonl", ROWS[:3]), evaluation_path=evaluation_path)
    questions = load(config, told, tmp_path)
    assert [question.id for question in questions.evaluation] == ["held/x-0"]
    assert len(questions.train) == 3


def test_a_tilde_is_the_home_folder(tmp_path, told, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "sums" / "train.jsonl", ROWS)
    files = Files(FilesConfig(path="~/sums/*.jsonl"), told.context(tmp_path))
    hugging_face = HuggingFace(HuggingFaceConfig(path="~/sums"), told.context(tmp_path))
    assert len(files.load().train) == len(hugging_face.load().train) == len(ROWS)


def test_a_glob_reads_its_files_in_order(tmp_path, told):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", ROWS[:1])
    config = FilesConfig(path=str(tmp_path / "*.jsonl"))
    assert [question.id for question in load(config, told, tmp_path).train] == ["a-0", "b-0"]


def test_a_split_column_that_a_parquet_file_lacks_is_left_to_loading(tmp_path, told):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    config = FilesConfig(path=str(tmp_path / "x.parquet"), split_column="part")
    assert config.num_questions() is None
    with pytest.raises(DataError, match="x.parquet: split_column 'part' is missing"):
        load(config, told, tmp_path)


def test_values_that_are_no_json_are_written_or_told_of(tmp_path, told):
    row = {"question": "a", "answer": 2.0, "day": datetime.date(2026, 1, 2), "raw": b"x", "nan": float("nan")}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    (question,) = load(FilesConfig(path=str(tmp_path / "x.parquet")), told, tmp_path).train
    assert question.answer == "2"
    assert question.columns == {"day": "2026-01-02", "nan": None}
    assert told == [f"{tmp_path / 'x.parquet'}: column 'raw' is left out of 1 rows: its values are no JSON"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            '{"qestion": "a", "answer": "1"}\n',
            {"id_column": "name"},
            "question_column 'question' is missing (did you mean 'qestion'?); id_column 'name' is missing; "
            "its columns are 'qestion', 'answer'",
        ),
        ("", {}, "is empty; give a file with at least one question"),
        ("\n\n", {}, "is empty; give a file with at least one question"),
        (
            '{"question": "a", "answer": "1"}\n{"question": \n',
            {},
            "cannot be read as .jsonl: line 2, column 13: Expecting value",
        ),
        ("[1]\n", {}, "cannot be read as .jsonl: line 1 holds list, not an object with a key per column"),
        (
            '{"question": "", "answer": "1"}\n',
            {},
            "no row can be used, left out: 1 because 'question' is empty",
        ),
        (
            '{"question": "a", "answer": "1", "n": 5}\n{"question": "b", "answer": "1", "n": 5}\n',
            {"id_column": "n"},
            "id '5' occurs already in {path}, row 0; make 'n' unique, or set id_column: null",
        ),
        (
            '{"question": "a", "answer": "1", "split": "train"}\n',
            {"split_column": "split", "evaluation_split": "test"},
            "evaluation_split 'test' has no rows (no other)",
        ),
    ],
)
def test_broken_files_are_named_with_what_is_wrong(tmp_path, told, content, options, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load(FilesConfig(path=str(path), **options), told, tmp_path)
    where, _, what = str(caught.value).removeprefix(str(path)).partition(": ")
    assert what == message.format(path=path)
    assert where in ("", ", row 1")


def test_files_that_are_not_there_are_named(tmp_path, told):
    for path, message in {
        "no.jsonl": "there is no such file, seen from",
        "*.jsonl": "no file matches, seen from",
        "": "is a folder; give the files in it, with a glob, seen from",
    }.items():
        with pytest.raises(DataError, match=message):
            load(FilesConfig(path=str(tmp_path / path)), told, tmp_path)
        assert FilesConfig(path=str(tmp_path / path)).num_questions() is None
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(DataError) as caught:
        load(FilesConfig(path=str(tmp_path / "x.xlsx")), told, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'x.xlsx'}: unknown format '.xlsx'; the formats are "
        ".jsonl, .ndjson, .json, .parquet, .csv"
    )
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="x.parquet: cannot be read as .parquet: "):
        load(FilesConfig(path=str(tmp_path / "x.parquet")), told, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "Q"}, "'Q' lacks '{question}'; put it where the question's text belongs"),
        ({"evaluation_split": "test"}, "evaluation_split: needs split_column, the column that holds it"),
        ({"answer_column": "question"}, "question_column and answer_column are both 'question'"),
        ({"answer_pattern": "a"}, "'a' has 0 groups; put one ( ) around the answer, others as (?: )"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        FilesConfig(path="x.jsonl", **options)
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"


def test_prompts_are_worded_as_text_or_as_messages(tmp_path, told):
    path = write_lines(tmp_path / "x.jsonl", [{"question": "2+{x}", "answer": "1"}])
    options = {"path": path, "prompt_template": "Q: {question}\nA:", "system_prompt": "Be brief."}
    (question,) = load(FilesConfig(**options), told, tmp_path).train
    assert question.prompt == "Be brief.\n\nQ: 2+{x}\nA:"
    assert question.text == "2+{x}"
    (question,) = load(FilesConfig(**options, chat=True), told, tmp_path).train
    assert question.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 2+{x}\nA:"},
    )


def test_gsm8k_loads_with_its_splits(tmp_path, told):
    path = SHARED_DATA / "gsm8k.parquet"
    if not path.exists():
        pytest.skip(f"needs {path}")
    config = FilesConfig(
        path=str(path),
        answer_column="solution",
        answer_pattern="#### (.*)",
        split_column="split",
        evaluation_split="test",
    )
    questions = load(config, told, tmp_path)
    assert len(questions.train) == config.num_questions() == 7473
    assert len(questions.evaluation) == 1319
    assert questions.train[0].answer == questions.train[0].columns["answer"] == "72"
    assert questions.left_out == {}


# huggingface


def test_saved_datasets_load_with_and_without_splits(tmp_path, told):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    one = HuggingFace(HuggingFaceConfig(path=str(tmp_path / "one")), told.context(tmp_path)).load()
    assert [question.id for question in one.train] == ["train-0", "train-1", "train-2", "train-3"]
    assert one.train[1].answer == "2" and one.train[1].columns == {"level": 1}
    config = HuggingFaceConfig(path=str(tmp_path / "two"), evaluation_split="test")
    two = HuggingFace(config, told.context(tmp_path)).load()
    assert two.train == one.train
    assert [question.id for question in two.evaluation] == ["test-0"]
    with pytest.raises(DataError) as caught:
        config = HuggingFaceConfig(path=str(tmp_path / "two"), evaluation_split="tests")
        HuggingFace(config, told.context(tmp_path)).load()
    assert str(caught.value) == (
        f"{tmp_path / 'two'}: evaluation_split 'tests' is missing (did you mean 'test'?); its splits are "
        "'train', 'test'"
    )


def test_a_folder_of_parquet_files_loads(tmp_path, told):
    folder = tmp_path / "data"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), folder / "test.parquet")
    config = HuggingFaceConfig(path=str(folder), evaluation_split="test")
    questions = HuggingFace(config, told.context(tmp_path)).load()
    assert [question.text for question in questions.train] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert [question.id for question in questions.evaluation] == ["test-0"]


def test_what_cannot_be_loaded_is_named(tmp_path, told):
    with pytest.raises(DataError, match=r"cannot be loaded from this folder"):
        HuggingFace(HuggingFaceConfig(path=str(tmp_path)), told.context(tmp_path)).load()
    write_lines(tmp_path / "d" / "train.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"d: split 'validation' cannot be loaded from this folder: .*validation"
    ):
        config = HuggingFaceConfig(path=str(tmp_path / "d"), split="validation")
        HuggingFace(config, told.context(tmp_path)).load()
    with pytest.raises(DataError, match=r"is a file; dataset type 'files' reads it"):
        config = HuggingFaceConfig(path=str(tmp_path / "d" / "train.jsonl"))
        HuggingFace(config, told.context(tmp_path)).load()
    with pytest.raises(DataError, match=r"d, split 'train': answer_column 'anser' is missing \(did you mean"):
        config = HuggingFaceConfig(path=str(tmp_path / "d"), answer_column="anser")
        HuggingFace(config, told.context(tmp_path)).load()


# reasoning_gym


def gym(told: Told, tasks: list[TaskConfig], **options):
    return ReasoningGym(ReasoningGymConfig(tasks=tasks, **options), told.context(Path(".")))


def test_tasks_are_mixed_by_weight_and_repeatable(told):
    tasks = [TaskConfig(name="chain_sum", weight=3), TaskConfig(name="spell_backward")]
    questions = gym(told, tasks, size=20).load()
    assert questions == gym(told, tasks, size=20).load()
    assert questions.train != gym(told, tasks, size=20, seed=1).load().train
    names = [question.columns["task"] for question in questions.train]
    assert names.count("chain_sum") == 15 and names.count("spell_backward") == 5
    assert set(names[:5]) == {"chain_sum", "spell_backward"}
    assert len({question.text_hash for question in questions.train}) == 20
    json.dumps([question.columns for question in questions.train])


def test_repeated_questions_are_counted_and_replaced(told):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    questions = gym(told, [TaskConfig(name="chain_sum", options=options)], size=150).load()
    assert len({question.text_hash for question in questions.train}) == 150
    assert questions.left_out["reasoning_gym task 'chain_sum': its question repeats another"] > 0


def test_a_task_that_draws_from_the_global_generator_is_repeatable(told):
    random.seed(5)
    first = gym(told, [TaskConfig(name="codeio")], size=3).load()
    random.seed(6)
    assert gym(told, [TaskConfig(name="codeio")], size=3).load() == first


ENTRIES = {
    "chain_sum": {"answer": "-8", "metadata": {"expression": "60 + 7 - 75"}},
    "spell_backward": {"answer": "nus", "metadata": {"word": "sun"}},
    "letter_counting": {"answer": "3", "metadata": {"target_letter": "e", "span": ["Eel", "a", "the"]}},
    "base_conversion": {
        "answer": "11110011",
        "metadata": {"source_base": 11, "target_base": 2, "source_repr": "201", "decimal_value": 243},
    },
}
"""As reasoning-gym's tasks write them, as far as short forms read them."""


@pytest.mark.parametrize(
    ("name", "question", "solution"),
    [
        ("chain_sum", "60+7-75=", "67 -8:-8"),
        ("spell_backward", "sun", ":nus"),
        ("letter_counting", "e:Eel a the", "2 2 3:3"),
        ("base_conversion", "11>2:201", "243:11110011"),
    ],
)
def test_a_short_form_asks_in_few_characters_and_works_out_the_answer(name, question, solution):
    assert SHORT_FORMS[name](ENTRIES[name]) == (question, solution)


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_short_questions_of_a_task_have_solutions_that_end_in_the_answer(told: Told, name):
    with_solutions = gym(told, [TaskConfig(name=name, short=True, solutions=True)], size=12).load()
    for question in with_solutions.train:
        assert question.solution.rpartition(":")[2] == question.answer
        assert len(question.text) < len(question.columns["entry"]["question"])
    without = gym(told, [TaskConfig(name=name, short=True)], size=12).load()
    assert [question.solution for question in without.train] == [None] * 12
    assert [question.text for question in without.train] == [
        question.text for question in with_solutions.train
    ]


def test_the_whole_worked_solution_can_be_asked_for(told: Told):
    task = TaskConfig(name="chain_sum", short=True, solutions=True, asks_work=True)
    for question in gym(told, [task], size=12).load().train:
        assert question.answer == question.solution
        assert question.answer.count(" ") == len(re.findall("[-+]", question.text)) - 1


def test_the_option_short_names_the_tasks_that_have_a_short_form():
    told = TaskConfig.model_fields["short"].description
    assert re.findall("``([a-z_]+)``", told) == list(SHORT_FORMS)


def test_what_has_no_short_form_is_refused_with_what_has():
    with pytest.raises(
        ValidationError, match="'codeio' has no short form; those that have one: base_conversion"
    ):
        TaskConfig(name="codeio", short=True)
    with pytest.raises(ValidationError, match="only short questions have worked solutions; set short too"):
        TaskConfig(name="chain_sum", solutions=True)
    with pytest.raises(ValidationError, match="asks_work: only short questions have worked solutions"):
        TaskConfig(name="chain_sum", asks_work=True)


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [
        (
            TaskConfig(name="chain_sun"),
            5,
            "reasoning_gym task 'chain_sun': is unknown; did you mean 'chain_sum'?",
        ),
        (
            TaskConfig(name="chain_sum", options={"max_term": 3}),
            5,
            "reasoning_gym task 'chain_sum': option 'max_term' is unknown; did you mean 'max_terms'?",
        ),
        (
            TaskConfig(name="chain_sum", options={"min_terms": 9}),
            5,
            "reasoning_gym task 'chain_sum': cannot be made with {\"min_terms\": 9}: "
            "max_terms must be >= min_terms",
        ),
        (
            TaskConfig(
                name="chain_sum", options={"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
            ),
            11,
            "reasoning_gym task 'chain_sum': gave 10 distinct questions in 320 tries, not 11; lower size or "
            "weight, or widen the task's options",
        ),
    ],
)
def test_impossible_tasks_are_named_with_what_is_wrong(told, task, size, message):
    with pytest.raises(DataError) as caught:
        gym(told, [task], size=size).load()
    assert str(caught.value) == message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.fractions(),
    lambda parts: (
        st.lists(parts)
        | st.lists(parts).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), parts)
        | st.sets(st.integers(), max_size=1)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_gym_entries_come_back_from_json_as_they_were(value):
    assert repr(from_json(json.loads(json.dumps(to_json(value))))) == repr(value)


# all of them


@pytest.mark.parametrize(
    "component", [(Files, FilesConfig), (HuggingFace, HuggingFaceConfig), (ReasoningGym, ReasoningGymConfig)]
)
def test_every_example_loads(component, tmp_path, told):
    plugin, config_class = component
    config = config_class.example(tmp_path)
    assert config_class.model_validate_json(config.model_dump_json()) == config
    questions = plugin(config, told.context(tmp_path)).load()
    assert len(questions.train) >= 10
    assert config.num_questions() in (None, len(questions.train))
    assert told == []


def test_text_of_another_encoding_is_refused_and_a_byte_order_mark_is_read_over(tmp_path, told):
    latin, marked = tmp_path / "latin.jsonl", tmp_path / "marked.jsonl"
    latin.write_bytes('{"question": "\u00e9", "answer": "1"}'.encode("latin-1"))
    marked.write_bytes('{"question": "1 + 1", "answer": "2"}'.encode("utf-8-sig"))
    with pytest.raises(
        DataError, match=r"latin.jsonl: is not UTF-8 text \(byte 0xe9 at position 14\); save it as"
    ):
        load(FilesConfig(path=str(latin)), told, tmp_path)
    assert load(FilesConfig(path=str(marked)), told, tmp_path).train[0].text == "1 + 1"


def test_a_csv_file_with_a_repeated_column_is_refused(tmp_path, told):
    (tmp_path / "twice.csv").write_text("question,answer,answer\n1 + 1,2,3\n")
    with pytest.raises(DataError, match="its header has the column 'answer' twice; rename one of them"):
        load(FilesConfig(path=str(tmp_path / "twice.csv")), told, tmp_path)
