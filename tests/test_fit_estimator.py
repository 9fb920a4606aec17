"""Fitting adapters to tables of success rates, and judging them on what they never saw: the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dteframe import DataError
from dteframe.cli import app
from dteframe.estimators.adapter import load_adapter
from dteframe.estimators.easiness import sigmoid
from dteframe.experiments.fit_estimator import JUDGED, STOPPING, TRAINED_ON, sides_of
from dteframe.experiments.recorded_rates import read_recorded_rates
from dteframe.experiments.transfer import family_of, recorded_for_transfer, splits

torch = pytest.importorskip("torch")

WORDS = {"add": 1.5, "multiply": 0.5, "integrate": -0.5, "prove": -1.5}
"""What a question asks for, and how easy that is."""
POLICIES = {"gpt-a": 0.5, "llama-b": -0.5, "yi-c": 0.0}
RECIPE = """\
name: mine
training: {questions_per_step: 2, num_generations: 8, selection_interval: 2, max_steps: 4}
model: {type: from_scratch}
dataset: {type: list_operations}
reward: {type: exact_match}
estimator: {type: attention, reference_size: 8, embeddings: {type: ngrams, width: 32}}
"""


def written(path: Path, num_questions: int = 120, **columns: list) -> Path:
    """Write a trace of three policies at two versions, whose rates hang on the question's first word."""
    rng = np.random.default_rng(0)
    kinds = list(WORDS)
    rows = []
    for number in range(num_questions):
        kind = kinds[number % len(kinds)]
        name = "".join(rng.choice(list("abcdefghij"), 24))
        for policy, level in POLICIES.items():
            for version in (0, 10):
                successes = int(rng.binomial(8, sigmoid(np.array(2 * WORDS[kind] + level))))
                text = f"{kind} {kind} {kind} {name}"
                rows.append((f"q{number}", text, policy, version, successes, 8))
    names = ("question_id", "text", "policy", "policy_version", "successes", "trials")
    table = dict(zip(names, zip(*rows, strict=True), strict=True)) | columns
    lines = [
        json.dumps({name: values[row] for name, values in table.items() if values})
        for row in range(len(rows))
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "rates.jsonl")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTEFRAME_CACHE", str(tmp_path / "cache"))
    Path("mine.yaml").write_text(RECIPE)
    return tmp_path


def invoked(*words: object):
    return CliRunner().invoke(app, ["estimator", *map(str, words)])


def test_an_adapter_is_fitted_and_judged_on_questions_it_never_saw(folder, table):
    outcome = invoked("fit", table, "mine.yaml", "--out", "a.safetensors", "--json")
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert (report["num_questions"], report["num_policies"]) == (120, 3)
    assert (report["num_trained_on"], report["num_stopped_by"], report["num_judged"]) == (96, 12, 12)
    scores = report["scores"]
    for better in ("ridge", "adapter"):
        assert scores[better]["pearson"]["value"] > scores["constant"]["pearson"]["value"] + 0.3
        assert scores[better]["nll_nats"]["value"] < scores["constant"]["nll_nats"]["value"] - 0.05
    assert load_adapter(Path("a.safetensors")).shape.embedder_id == "ngrams:32"


def test_the_same_seed_gives_the_same_file_and_another_another(folder, table):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert invoked("fit", table, "mine.yaml", "--out", name, "--seed", seed).exit_code == 0
    a, b, c = (Path(name).read_bytes() for name in "abc")
    assert a == b != c


def test_the_file_says_what_it_is_from(folder, table):
    from safetensors import safe_open

    table_text = invoked("fit", table, "mine.yaml", "--out", "a.safetensors").stdout
    with safe_open("a.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["dteframe_adapter"])["about"]
    name, digest, rows = about["files"][0]
    assert (name, len(digest), rows) == ("rates.jsonl", 64, 720)
    assert about["settings"]["training"]["seed"] == 1
    assert f"{about['scores']['ridge']['brier']['value']:.4f} +- " in table_text


def test_a_recipe_uses_the_fitted_adapter(folder, table):
    assert invoked("fit", table, "mine.yaml", "--out", "a.safetensors").exit_code == 0
    words = ["estimator.adapter=a.safetensors", "--seeds", "1"]
    outcome = invoked("evaluate", table, "mine.yaml", *words, "--json")
    assert outcome.exit_code == 0, outcome.output
    plain = invoked("evaluate", table, "mine.yaml", "--seeds", "1", "--json")
    found = [
        json.loads(item.stdout)["verdicts"][0]["everything"]["pearson"]["value"] for item in (outcome, plain)
    ]
    assert found[0] > found[1]


def test_an_adapter_of_another_embedder_is_refused_by_name(folder, table):
    assert invoked("fit", table, "mine.yaml", "--out", "a.safetensors").exit_code == 0
    words = ["estimator.adapter=a.safetensors", "estimator.embeddings.width=16"]
    outcome = invoked("evaluate", table, "mine.yaml", *words)
    assert outcome.exit_code == 1
    assert (
        "a.safetensors: the adapter was trained on embeddings 'ngrams:32' of width 32, the recipe's are "
        "'ngrams:16' of width 16; change estimator.embeddings or estimator.adapter"
    ) in outcome.stderr


@pytest.mark.parametrize("unseen", ["questions", "policies"])
def test_a_transfer_names_every_contender(folder, table, unseen):
    outcome = invoked("transfer", table, "mine.yaml", "--unseen", unseen, "--seeds", "1", "--json")
    assert outcome.exit_code == 0, outcome.output
    results = {item["contender"]: item for _, item in json.loads(outcome.stdout)}
    assert list(results) == ["constant", "attention", "probe", "ridge", "adapter"]
    assert results["constant"]["pearson_within"] is None  # a constant correlates with nothing
    assert results["ridge"]["pearson_within"]["value"] > 0.7
    # Each question is judged once: by all three policies, or by those of its fold's families.
    expected = {"questions": 360, "policies": 3 * 24}[unseen]
    assert results["adapter"]["scores"]["num_forecasts"] == expected


# Splits


def test_near_duplicates_stay_on_one_side():
    groups = np.arange(100) // 2
    sides = sides_of(groups, 0.2, 0)
    np.testing.assert_array_equal(sides[::2], sides[1::2])
    assert [int((sides == side).sum()) for side in (TRAINED_ON, STOPPING, JUDGED)] == [80, 10, 10]


def test_a_question_is_judged_in_one_fold_and_its_policies_family_is_not_fitted_to(table):
    recorded, judged_by = recorded_for_transfer(table, [], "policies", print)
    folds = splits(recorded, judged_by, "policies", 0)
    assert (sum(fold.sides == JUDGED for fold in folds) == 1).all()
    assert sorted(place for fold in folds for place in fold.judged_policies) == [0, 1, 2]
    for fold in folds:
        judged = {judged_by.policies[place] for place in fold.judged_policies}
        assert judged.isdisjoint(fold.counts.policies)
        assert len(judged) + len(fold.counts.policies) == 3


def test_unseen_questions_are_fitted_to_in_the_first_half_and_judged_in_the_second(table):
    recorded, judged_by = recorded_for_transfer(table, [], "questions", print)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for counts, version in ((recorded.counts, 0), (judged_by, 10)):
        assert counts.successes.sum() == sum(
            row["successes"] for row in rows if row["policy_version"] == version
        )
        assert counts.trials.sum() == 360 * 8


def test_families_are_what_models_descend_from():
    names = ["Meta-Llama-3-8B", "llama-2", "gpt-4o@azure", "o1-mini", "Qwen2.5-7B", "qwen2-1.5b", "yi_large"]
    assert [family_of(name) for name in names] == ["llama", "llama", "gpt", "gpt", "qwen", "qwen", "yi"]


# Tables that cannot be used


def test_the_same_question_in_two_tables_is_one(tmp_path):
    first, second = written(tmp_path / "a.jsonl", 12), tmp_path / "b.jsonl"
    second.write_text(first.read_text().replace("add add", "add  add").replace("gpt-a", "other"))
    recorded = read_recorded_rates([first, second], print)
    assert len(recorded.texts) == 12
    assert recorded.counts.policies == ("gpt-a", "llama-b", "other", "yi-c")
    assert recorded.counts.trials.tolist() == [[16] * 12, [32] * 12, [16] * 12, [32] * 12]


def test_questions_of_a_table_that_is_to_be_replayed_are_left_out_with_their_near_duplicates(folder, table):
    replayed = written(folder / "replayed.jsonl", 20)
    replayed.write_text(replayed.read_text().replace('"text": "', '"text": "Now, '))
    outcome = invoked("fit", table, "mine.yaml", "--without", replayed, "--out", "a.safetensors", "--json")
    assert json.loads(outcome.stdout)["num_questions"] == 100
    assert "20 of 120 questions are left out: they are in the tables of --without" in outcome.stderr
    outcome = invoked("fit", table, "mine.yaml", "--without", table, "--out", "b.safetensors")
    assert "--without: its tables hold all 120 questions; leave out fewer, or fit to more" in outcome.stderr


def test_rows_of_evaluation_are_left_out_and_counted(tmp_path):
    told: list[str] = []
    purposes = ["evaluation", "train"] * 36
    path = written(tmp_path / "t.jsonl", 12, purpose=purposes)
    assert read_recorded_rates([path], told.append).counts.trials.tolist() == [[8] * 12] * 3
    assert told == [f"{path}: 36 of 72 rows are of evaluation and are left out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": []}, "lacks the columns trials of a trace; has"),
        ({"text": []}, "has no column text; adapters read the questions' texts"),
        ({"text": [" "] * 72}, "question 'q0' has no text; leave it out"),
        (
            {"trials": [0] * 72, "successes": [0] * 72},
            "row 0 (question 'q0') has 0 successes in 0 trials; needs",
        ),
        ({"successes": [9] * 72}, "row 0 (question 'q0') has 9 successes in 8 trials; needs"),
        ({"successes": [0.5] * 72}, "row 0 has successes 0.5; must be a whole number (counts, not rates)"),
    ],
)
def test_tables_that_cannot_be_used_are_errors_that_name_the_row(tmp_path, change, message):
    path = written(tmp_path / "t.jsonl", 12, **change)
    with pytest.raises(DataError) as error:
        read_recorded_rates([path], print)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mine.yaml"],
            "no table is given; name a trace, a run folder or a published table of success rates",
        ),
        (["TABLE", "mine.yaml", "estimator.type=uniform"], "estimator.type: "),
        (
            ["TABLE", "mine.yaml", "estimator.embeddings={type: policy}"],
            "estimator.embeddings: those of the policy are known in a run alone; name {type: ngrams}",
        ),
        (["SMALL"], "adapter training: 10 questions to train on and 1 to stop by; needs 10 of each at least"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file; give a trace (.parquet, .jsonl) or a run folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_fitted(folder, table, words, message):
    small = written(folder / "small.jsonl", 12)
    named = {"TABLE": table, "SMALL": small}
    outcome = invoked("fit", *[named.get(word, word) for word in words], "--out", "a.safetensors")
    assert outcome.exit_code != 0
    assert message in outcome.stderr
    assert not Path("a.safetensors").exists()


def test_an_estimator_without_an_adapter_is_refused(folder, table):
    outcome = invoked("fit", table, "mine.yaml", "estimator={type: beta_posterior}", "--out", "a.safetensors")
    assert (
        "estimator.type: 'beta_posterior' takes no adapter; name a recipe with 'attention' or "
        "'history_and_attention'"
    ) in outcome.stderr


def test_a_file_in_a_folder_that_is_missing_is_refused_at_once(folder, table):
    outcome = invoked("fit", table, "--out", "missing/a.safetensors")
    assert (
        "--out missing/a.safetensors: cannot be written; give a file in a folder that exists"
        in outcome.stderr
    )
