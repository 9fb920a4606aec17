"""Judging estimators on traces: ceilings and scores by hand, replays that never look ahead, the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dteframe import Context, DataError, Estimator, EstimatorConfig, SuccessEstimate
from dteframe.cli import app
from dteframe.experiments.ceiling import best_informative_fraction, ceiling_of, distribution_of_rates
from dteframe.experiments.evaluate_estimators import part_of
from dteframe.experiments.published_traces import read_any_trace
from dteframe.experiments.replay_trace import Forecasts, replay
from dteframe.experiments.rounds import rounds_of
from dteframe.experiments.scores import differences_of, reliability, scores_of
from dteframe.records import BatchArithmetic
from dteframe.selectors.uniform import UniformConfig, UniformSelector
from dteframe.traces import trace_of_rows, write_trace

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCS = Path(__file__).parents[1] / "docs"
CONTEXT = Context(Path("unused"), Path("unused"), "cpu", 0, lambda *_: None, lambda _: None)


def forecasts_of(mean, successes, trials=8, question=None, evidence=1e6) -> Forecasts:
    size = len(mean)
    return Forecasts(
        np.zeros(size, np.int64),
        np.arange(size) if question is None else np.array(question),
        np.array(mean, float),
        np.full(size, float(evidence)),
        np.array(successes),
        np.full(size, trials),
        np.zeros(size, bool),
    )


def everything(item: Forecasts) -> np.ndarray:
    return np.ones(len(item.mean), bool)


# Ceilings


def test_the_ceiling_is_what_the_true_rates_score():
    rng = np.random.default_rng(0)
    rates = rng.choice([0.0, 0.2, 0.5, 0.9], 40_000)
    successes = rng.binomial(8, rates)
    trials = np.full(40_000, 8)
    ceiling = ceiling_of(successes, trials)
    assert ceiling.pearson == pytest.approx(np.corrcoef(rates, successes / 8)[0, 1], abs=0.003)
    assert ceiling.brier == pytest.approx(np.mean((rates - successes / 8) ** 2), abs=0.0005)
    inside = rates[(rates > 0) & (rates < 1)]
    entropy = -(inside * np.log(inside) + (1 - inside) * np.log(1 - inside))
    assert ceiling.nll_nats == pytest.approx(entropy.sum() / 40_000, abs=0.01)
    weights = distribution_of_rates(successes, trials)
    assert weights[:5].sum() == pytest.approx(0.25, abs=0.03)


def test_the_best_choice_takes_the_most_informative_rates():
    rng = np.random.default_rng(0)
    rates = np.repeat([0.0, 0.5], 5000)
    successes, trials = rng.binomial(8, rates), np.full(10_000, 8)
    assert best_informative_fraction(successes, trials, 0.25) == pytest.approx(1 - 2 / 256, abs=0.01)
    assert best_informative_fraction(successes, trials, 1.0) == pytest.approx(0.496, abs=0.01)


def test_single_rollouts_have_no_ceiling():
    assert ceiling_of(np.array([0, 1, 1]), np.array([1, 1, 1])) is None


# Scores


def test_scores_by_hand():
    scores = scores_of([forecasts_of([0.25, 0.5, 0.75], [0, 4, 8])], everything, 0)
    assert scores.num_forecasts == 3
    assert scores.pearson.value == pytest.approx(1.0)
    assert scores.brier.value == pytest.approx((0.0625 + 0 + 0.0625) / 3)
    assert scores.slope.value == pytest.approx(2.0)  # measured rates are spread twice as far
    nll = -(2 * np.log(0.75) + np.log(0.5)) / 3
    assert scores.nll_nats.value == pytest.approx(nll, rel=1e-4)


def test_no_idea_costs_what_the_uniform_distribution_costs():
    scores = scores_of([forecasts_of([0.5, 0.5], [8, 0], evidence=0.0)], everything, 0)
    assert scores.nll_nats.value == pytest.approx(np.log(9) / 8)
    assert scores.pearson is None
    assert scores.slope is None


def test_an_interval_holds_its_value_and_the_value_does_not_depend_on_the_questions():
    rng = np.random.default_rng(0)
    mean = rng.random(400)
    successes = rng.binomial(8, mean)
    many = scores_of([forecasts_of(mean, successes)], everything, 0).brier
    few = scores_of([forecasts_of(mean, successes, question=np.arange(400) % 8)], everything, 0).brier
    assert many.low < many.value < many.high
    assert many.value == pytest.approx(few.value)


def test_differences_are_of_the_same_questions_and_far_surer_than_each_score():
    rng = np.random.default_rng(0)
    rates = rng.random(300)
    successes = rng.binomial(8, rates)
    better, worse = forecasts_of(rates, successes), forecasts_of(0.9 * rates + 0.05, successes)
    found = differences_of([better], [worse], are_seen=None, seed=0)
    one, other = (scores_of([item], everything, 0) for item in (better, worse))
    assert found.num_forecasts == 300
    assert found.brier.value == pytest.approx(one.brier.value - other.brier.value)
    assert found.nll_nats.value == pytest.approx(one.nll_nats.value - other.nll_nats.value)
    assert found.pearson.value == pytest.approx(0.0, abs=1e-12)  # a line changes no correlation
    assert found.nll_nats.low < found.nll_nats.value < found.nll_nats.high < 0
    assert one.nll_nats.high > other.nll_nats.low  # the two intervals overlap
    part = better.at(np.arange(10, 20))
    assert differences_of([part], [worse], are_seen=None, seed=0).num_forecasts == 10
    assert differences_of([part], [worse], are_seen=True, seed=0) is None


def test_a_reliability_diagram_counts_every_forecast():
    bins = reliability([forecasts_of([0.0, 0.04, 0.55, 1.0], [0, 8, 4, 8])], num_bins=10)
    assert [(item.num_forecasts, item.measured) for item in bins] == [(2, 0.5), (1, 0.5), (1, 1.0)]
    assert bins[0].predicted == pytest.approx(0.02)


# Replays


def dense_trace(num_questions=12, num_visits=5, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.random(num_questions)
    rows = {"question_id": [], "policy_version": [], "successes": [], "trials": []}
    for visit in range(num_visits):
        for question in range(num_questions):
            counts = int(rng.binomial(8, rates[question]))
            for name, value in zip(rows, (f"q{question}", 10 * visit, counts, 8), strict=True):
                rows[name].append(value)
    return trace_of_rows(rows, "here")


class WatchingConfig(EstimatorConfig):
    type: str = "watching"

    def num_references(self):
        return 2


class Watching(Estimator):
    """Notes the order of calls, and predicts by what it saw."""

    config: WatchingConfig

    def start(self, questions, encode_with_policy):
        self.ids = tuple(question.id for question in questions)
        self.calls = []

    def references(self, rng):
        return [self.ids[place] for place in rng.choice(len(self.ids), 2, replace=False)]

    def observe(self, observation):
        self.calls.append((observation.purpose, observation.policy_version, set(observation.question_ids)))

    def predict(self, policy_version):
        self.calls.append(("predict", policy_version, set()))
        return SuccessEstimate(self.ids, np.full(len(self.ids), 0.5), np.zeros(len(self.ids)))


def test_a_replay_measures_after_it_predicts_and_never_scores_a_reference():
    rounds = rounds_of(dense_trace(), None)
    estimator = Watching(WatchingConfig(), CONTEXT)
    selector = UniformSelector(UniformConfig(), CONTEXT)
    result = replay(rounds, estimator, selector, BatchArithmetic(4, 4, 8, 1, 0, 2, 16, 16), 0)
    kinds = [kind for kind, _, _ in estimator.calls]
    assert kinds == ["reference", "predict", "train"] * 5
    assert [version for _, version, _ in estimator.calls[::3]] == [0, 10, 20, 30, 40]
    assert result.reference_rollouts == 5 * 2 * 8
    assert len(result.forecasts.mean) == 5 * (12 - 2)
    for number in range(5):
        _, _, references = estimator.calls[3 * number]
        _, _, chosen = estimator.calls[3 * number + 2]
        assert references.isdisjoint(chosen)
        asked = {int(name[1:]) for name in references}
        scored = set(result.forecasts.question[result.forecasts.round == number].tolist())
        assert scored == set(range(12)) - asked
    assert not result.forecasts.is_seen[result.forecasts.round == 0].any()


def test_rounds_are_spread_over_the_visits_and_none_is_used_twice():
    trace = dense_trace(num_questions=2, num_visits=7)
    rounds = rounds_of(trace, 3)
    assert rounds.policy_versions.tolist() == [0, 20, 40]  # visits 0, 2 and 4 of 7
    assert rounds.left_out == {"between the rounds": 8}
    with pytest.raises(DataError, match=r"^trace: 8 rounds need as many policy versions, .* are 7 versions;"):
        rounds_of(trace, 8)
    with pytest.raises(DataError, match=r"^trace: 1 rounds; the second is the first that can judge"):
        rounds_of(trace, 1)


def sparse_trace(num_questions=60, num_versions=20):
    """Three questions a step, each met once, but the first three come back at the end; one is evaluation."""
    rows = {"question_id": [], "policy_version": [], "successes": [], "trials": [], "purpose": []}
    for place in [*range(num_questions), 0, 1, 2]:
        version = min(len(rows["trials"]) // 3, num_versions - 1)
        values = (f"q{place}", version, place % 9, 8, "train")
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    for name, value in zip(rows, ("q59", 19, 8, 8, "evaluation"), strict=True):
        rows[name].append(value)
    return trace_of_rows(rows, "here")


def test_questions_that_do_not_come_back_are_laid_out_by_time():
    rounds = rounds_of(sparse_trace(), 4)  # versions 0-4, 5-9, 10-14, 15-19 of 3 groups each, 6 in the last
    assert rounds.is_measured.sum(axis=1).tolist() == [15, 15, 15, 18]
    assert rounds.policy_versions.tolist() == [2, 7, 12, 17]
    assert rounds.is_measured[:, 0].tolist() == [True, False, False, True]
    assert rounds.left_out == {"evaluation": 1}
    twice = {
        "question_id": ["a", "a", "b"],
        "policy_version": [0, 1, 2],
        "successes": [1, 2, 3],
        "trials": [8] * 3,
    }
    rounds = rounds_of(trace_of_rows(twice, "here"), 2)
    assert rounds.successes.tolist() == [[1, 0], [0, 3]]  # versions 0 and 1; the first of both counts
    assert rounds.left_out == {"measured again in a round": 1}


def test_a_replay_reveals_only_what_was_measured_and_replaces_other_references():
    rounds = rounds_of(sparse_trace(), 4)
    estimator = Watching(WatchingConfig(), CONTEXT)
    selector = UniformSelector(UniformConfig(), CONTEXT)
    result = replay(rounds, estimator, selector, BatchArithmetic(4, 10, 8, 1, 0, 2, 16, 16), 0)
    assert [kind for kind, _, _ in estimator.calls] == ["reference", "predict", "train"] * 4
    for number in range(4):
        _, _, references = estimator.calls[3 * number]
        _, _, chosen = estimator.calls[3 * number + 2]
        measured = {rounds.questions[place].id for place in np.flatnonzero(rounds.is_measured[number])}
        assert references | chosen <= measured
        assert (len(references), len(chosen)) == (2, (len(measured) - 2) // 2)  # of 10 that were wanted
    assert len(result.forecasts.mean) == 15 + 15 + 15 + 18 - 4 * 2
    assert (result.reference_rollouts, result.missing_references) == (4 * 2 * 8, 0)
    assert 1 <= result.replaced_references <= 8


def test_parts_are_every_nth_question():
    rounds = rounds_of(dense_trace(num_questions=5), None)
    assert [item.id for item in rounds.part(1, 2).questions] == ["q1", "q3"]
    np.testing.assert_array_equal(rounds.part(1, 2).successes, rounds.successes[:, [1, 3]])
    assert part_of("1/2") == (1, 2)
    with pytest.raises(DataError, match=r"^--part: '2/2' is no part; write I/N with 0 <= I < N"):
        part_of("2/2")


# The command

RECIPE = """\
name: mine
training: {questions_per_step: 2, num_generations: 8, selection_interval: 2, max_steps: 4}
model: {type: from_scratch}
dataset: {type: list_operations}
reward: {type: exact_match}
estimator: {type: beta_posterior}
selector: {type: informative_probability}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTEFRAME_CACHE", str(tmp_path / "cache"))
    write_trace(dense_trace(), tmp_path / "trace.parquet")
    Path("mine.yaml").write_text(RECIPE)
    return tmp_path


def test_the_command_compares_recipes_and_draws_a_diagram(folder):
    command = ["estimator", "evaluate", "trace.parquet", "mine.yaml", "--seeds", "2", "--diagram", "d.svg"]
    outcome = CliRunner().invoke(app, [*command, "--json"])
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert (found["num_questions"], found["num_rounds"], found["num_chosen"]) == (12, 5, 4)
    [verdict] = found["verdicts"]
    assert verdict["estimator"] == "beta_posterior"
    assert verdict["everything"]["num_forecasts"] == 2 * 5 * 12
    assert verdict["everything"]["num_forecasts"] == sum(
        verdict[kind]["num_forecasts"] for kind in ("seen", "unseen")
    )
    assert verdict["reference_rollouts"] == 0
    assert Path("d.svg").read_text().startswith("<?xml")
    table = CliRunner().invoke(app, command)
    assert "trace.parquet: 12 questions, 5 rounds of 4 chosen, 2 seeds" in table.stdout
    assert "\nmine " in table.stdout


def test_recipes_are_compared_with_one_of_them(folder):
    Path("other.yaml").write_text(RECIPE.replace("name: mine", "name: other"))
    command = ["estimator", "evaluate", "trace.parquet", "mine.yaml", "other.yaml", "--against", "other"]
    outcome = CliRunner().invoke(app, [*command, "--seeds", "1", "--diagram", "d.png"])
    assert outcome.exit_code == 0, outcome.output
    assert Path("d.png").read_bytes()[1:4] == b"PNG"
    assert "less other, on the same questions in the same rounds; [95 % interval]" in outcome.stdout
    row = outcome.stdout.split("\nmine ")[-1].split("\n")[0]
    assert row.split()[1] == "+0.000"  # the same estimator, the same choices
    outcome = CliRunner().invoke(app, [*command[:-1], "third"])
    assert outcome.exit_code == 1
    assert "--against: 'third' is none of the recipes mine, other" in outcome.stderr
    outcome = CliRunner().invoke(app, [*command, "--diagram", "d.pdf"])
    assert "--diagram d.pdf: must end in .png or .svg" in outcome.stderr


def test_a_comparison_is_written_into_the_page_between_its_marks(folder):
    spec = importlib.util.spec_from_file_location(
        "write_estimator_tables", DOCS / "write_estimator_tables.py"
    )
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    Path("other-uniform.yaml").write_text(RECIPE.replace("name: mine", "name: other-uniform"))
    command = [
        "estimator",
        "evaluate",
        "trace.parquet",
        "mine.yaml",
        "other-uniform.yaml",
        "--against",
        "mine",
    ]
    found = json.loads(CliRunner().invoke(app, [*command, "--json", "--seeds", "1"]).stdout)
    found["verdicts"][0]["recipe"] = "mine-uniform"
    scores = writer.scores(found).splitlines()
    assert [line.split("|")[1].strip() for line in scores[2:]] == ["mine, uniform", "other, uniform"]
    correlation = found["verdicts"][0]["seen"]["pearson"]["value"]
    assert scores[2].split("|")[2].strip().startswith(f"{correlation:.3f} ± ")
    differences = writer.differences(found).splitlines()
    assert len(differences) == 4, "two rows, of the recipe that the other is compared with"
    assert differences[2].startswith("| other | seen | +0.000 (+0.000 to +0.000) |")
    page = (DOCS / "estimators.md").read_text()
    written = writer.rewrite(page, "scores", "| a |")
    assert "| mine" not in written and "\n\n| a |\n\n<!-- end of scores -->" in written
    assert writer.rewrite(written, "scores", "| b |") == writer.rewrite(page, "scores", "| b |")
    with pytest.raises(ValueError, match="lacks '<!-- nothing: written by"):
        writer.rewrite(page, "nothing", "")


def test_a_trace_of_a_run_whose_questions_do_not_come_back_is_judged(folder):
    write_trace(sparse_trace(), folder / "sparse.parquet")
    words = ["estimator", "evaluate", "sparse.parquet", "mine.yaml", "--seeds", "1", "--rounds", "4"]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "rounds are stretches of time: 63 of 240 questions x rounds were measured" in outcome.stdout
    assert "groups left out: 1 evaluation" in outcome.stdout


def test_mistakes_are_told_without_a_traceback(folder):
    outcome = CliRunner().invoke(app, ["estimator", "evaluate", "nowhere.parquet", "mine.yaml"])
    assert outcome.exit_code == 1
    assert "nowhere.parquet: no such file; give a trace (.parquet, .jsonl) or a run folder" in outcome.stderr
    outcome = CliRunner().invoke(app, ["estimator", "evaluate", "trace.parquet"])
    assert outcome.exit_code == 2
    words = ["estimator.type=attention", "estimator.reference_size=2"]
    outcome = CliRunner().invoke(app, ["estimator", "evaluate", "trace.parquet", "mine.yaml", *words])
    assert outcome.exit_code == 1
    assert "trace: there is no policy to embed questions with" in outcome.stderr


# Published tables


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"question": ["a"], "solve_rate": [35.0], "n_rollouts": [128]},
            "row 0 has the success rate 35.0; success rates lie in [0, 1]",
        ),
        (
            {"question": ["a", "b"], "solve_rate": [0.5, 0.5], "n_rollouts": [8.0, 2.5]},
            "row 0 has n_rollouts 8.0; must be a whole number",
        ),
        (
            {"question": ["a", "b"], "solve_rate": [0.5, 0.0], "n_rollouts": [8, 0]},
            "row 1 (question 'row-1') has 0 successes in 0 trials; needs",
        ),
        (
            {"question": ["a", "b"], "acc_by_visit": [[0.5, 1.0], [0.5, -0.125]]},
            "row 1 has the success rate -0.125; success rates lie in [0, 1]",
        ),
        (
            {"question": ["a"], "acc_by_visit": [0.5]},
            "row 0 has acc_by_visit 0.5; must be a list of success rates",
        ),
        (
            {"text": ["a"], "solve_rate": [0.5], "n_rollouts": [8]},
            "lacks the column 'question' of a published table; has text, solve_rate, n_rollouts",
        ),
    ],
)
def test_published_tables_that_cannot_be_used_name_the_row(tmp_path, table, message):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table(table), path)
    with pytest.raises(DataError) as error:
        read_any_trace(path)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the published tables are not in {SHARED_DATA}")
def test_published_tables_are_read_as_their_authors_describe_them():
    [visits] = SHARED_DATA.glob("deepscaler_sub1209_*_acc_by_visit_dev.parquet")
    trace = read_any_trace(visits)
    assert len(trace.question_ids) == 807
    first = np.array([np.flatnonzero(trace.question == place)[0] for place in range(807)])
    assert np.mean(trace.successes[first] / 8) == pytest.approx(0.338, abs=0.0005)
    mixed = (trace.successes > 0) & (trace.successes < 8)
    assert mixed.mean() == pytest.approx(0.503, abs=0.0005)
    models = read_any_trace(SHARED_DATA / "gsm8k_test_x_models.parquet")
    assert len(set(models.policies)) == 36
    worst = np.array(models.policies) == "gpt3-6b_finetuning"
    assert models.successes[worst].mean() == pytest.approx(0.217, abs=0.0005)
