"""Estimators that keep records: their sums by hand, what they refuse, what they resume."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dteframe import Context, Observation, Question
from dteframe.beta_binomial import log_likelihood, mixed_probability, parameters
from dteframe.estimators.attention import AttentionConfig, AttentionEstimator
from dteframe.estimators.beta_posterior import BetaPosteriorConfig, BetaPosteriorEstimator
from dteframe.estimators.history_and_attention import (
    HistoryAndAttentionConfig,
    HistoryAndAttentionEstimator,
)
from dteframe.estimators.observed import AgedRecord, drifting, halving
from dteframe.estimators.policy_probe import (
    PolicyProbeConfig,
    PolicyProbeEstimator,
    fit_ridge,
    length_features,
)
from dteframe.estimators.recorded import RecordedConfig, RecordedEstimator
from dteframe.estimators.references import ReferenceSet
from dteframe.records import BatchArithmetic
from dteframe.traces import trace_of_rows, write_trace


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def context(tmp_path, warnings) -> Context:
    return Context(tmp_path / "cache", tmp_path, "cpu", 0, lambda *_: None, warnings.append)


def questions_of(count: int, **columns) -> tuple[Question, ...]:
    return tuple(
        Question(
            f"q{index}",
            f"text {index}",
            f"text {index}",
            "0",
            None,
            {name: values[index] for name, values in columns.items()},
        )
        for index in range(count)
    )


def observed(positions, successes, trials=8, version=0, purpose="train") -> Observation:
    ids = tuple(f"q{position}" for position in positions)
    return Observation(
        ids, np.array(successes), np.broadcast_to(trials, len(ids)).astype(int), version, purpose
    )


def one_number(_texts):
    return np.ones((len(_texts), 1), np.float32)


# Beta distributions


def test_no_evidence_is_the_uniform_distribution():
    first, second = parameters(np.array([0.5, 0.25, 0.25]), np.array([0.0, 8.0, 0.5]))
    np.testing.assert_allclose(first, [1.0, 2.0, 0.625])
    np.testing.assert_allclose(second, [1.0, 6.0, 0.875])


def test_the_chance_of_a_mixed_group_by_hand():
    # Beta(1, 1): every number of successes is as likely, 7 of the 9 are mixed at 8 rollouts
    assert mixed_probability(np.array([1.0]), np.array([1.0]), 8)[0] == pytest.approx(7 / 9)
    # as sure as can be of 1/2: 1 - 2 / 2**4
    assert mixed_probability(np.array([1e9]), np.array([1e9]), 4)[0] == pytest.approx(1 - 2 / 16)
    assert mixed_probability(np.array([3.0]), np.array([2.0]), 1)[0] == pytest.approx(0.0)
    # Beta(2, 1): P(2 right) = 2/3 * 3/4, P(2 wrong) = 1/3 * 2/4
    assert mixed_probability(np.array([2.0]), np.array([1.0]), 2)[0] == pytest.approx(1 - 1 / 2 - 1 / 6)


def test_the_likelihood_of_a_group_by_hand():
    # Beta(2, 1), one right and one wrong in this order: 2/3 * 1/4
    value = log_likelihood(np.array([2.0]), np.array([1.0]), np.array([1]), np.array([2]))
    assert np.exp(value)[0] == pytest.approx(2 / 3 * 1 / 4)
    total = sum(
        ways * np.exp(log_likelihood(np.array([0.7]), np.array([2.3]), np.array([count]), np.array([3])))[0]
        for count, ways in enumerate([1, 3, 3, 1])
    )
    assert total == pytest.approx(1.0)


# Records that fade


def test_a_record_halves_with_every_half_life():
    record = AgedRecord(3, [halving(2.0), halving(np.inf)])
    record.add(np.array([1]), np.array([4]), np.array([8]), policy_version=0)
    record.add(np.array([1]), np.array([1]), np.array([8]), policy_version=2)
    successes, trials = record.at(4, 0)
    np.testing.assert_allclose(successes, [0, (4 / 2 + 1) / 2, 0])
    np.testing.assert_allclose(trials, [0, (8 / 2 + 8) / 2, 0])
    np.testing.assert_allclose(record.at(100, 1, np.array([1])), [[5], [16]])


def test_a_record_of_a_drifting_rate_wears_off_the_faster_the_longer_it_is():
    record = AgedRecord(2, [drifting(100.0), drifting(np.inf)])
    record.add(np.array([0, 1]), np.array([4, 25]), np.array([8, 100]), policy_version=0)
    # 1/8 + 25/100 = 3/8, and 1/100 + 25/100 = 26/100; the rates stay 1/2 and 1/4
    successes, trials = record.at(25, 0)
    np.testing.assert_allclose(trials, [8 / 3, 100 / 26])
    np.testing.assert_allclose(successes / trials, [1 / 2, 1 / 4])
    record.add(np.array([0]), np.array([8]), np.array([8]), policy_version=25)
    np.testing.assert_allclose(np.array(record.at(25, 0))[:, 0], [4 / 3 + 8, 8 / 3 + 8])
    np.testing.assert_allclose(np.array(record.at(10_000, 1))[:, 1], [25, 100])


def test_a_late_measurement_is_aged_as_if_it_had_come_in_time():
    in_time, late = AgedRecord(1, [halving(3.0)]), AgedRecord(1, [halving(3.0)])
    at_1, at_5 = (
        (np.array([0]), np.array([2]), np.array([4]), 1),
        (np.array([0]), np.array([3]), np.array([4]), 5),
    )
    in_time.add(*at_1), in_time.add(*at_5)
    late.add(*at_5), late.add(*at_1)
    np.testing.assert_allclose(in_time.at(9, 0), late.at(9, 0))


# beta_posterior


def posterior(context, **options) -> BetaPosteriorEstimator:
    estimator = BetaPosteriorEstimator(BetaPosteriorConfig(**options), context)
    estimator.start(questions_of(3), one_number)
    return estimator


def test_a_posterior_by_hand(context):
    estimator = posterior(context, discount=0.5)
    estimator.observe(observed([1], [6]))  # a = 7, b = 3
    np.testing.assert_allclose(estimator.predict(1).mean, [0.5, 0.7, 0.5])
    estimator.observe(observed([1, 2], [0, 8], version=1))  # a = 3.5 + 0.5 + 0, b = 1.5 + 0.5 + 8
    estimate = estimator.predict(2)
    np.testing.assert_allclose(estimate.mean, [0.5, 4 / 14, 9 / 10])
    np.testing.assert_allclose(estimate.evidence, [2, 14, 10])


def test_a_question_that_is_observed_twice_at_once_is_one_measurement(context):
    estimator = posterior(context, discount=0.0)
    estimator.observe(observed([0, 0], [8, 0]))
    np.testing.assert_allclose(estimator.predict(1).mean, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(estimator.predict(1).evidence, [18, 2, 2])


def test_unknown_questions_and_impossible_counts_are_refused(context):
    estimator = posterior(context)
    with pytest.raises(
        ValueError, match=r"^beta_posterior: observed question 'q9', which is not among the 3"
    ):
        estimator.observe(observed([9], [1]))
    with pytest.raises(ValueError, match=r"^beta_posterior: question 'q0' has 9 successes in 8 trials; "):
        estimator.observe(observed([0], [9]))


# recorded


def test_rates_of_a_column_are_given_and_gaps_are_counted(context, warnings):
    estimator = RecordedEstimator(RecordedConfig(column="rate", evidence=4.0), context)
    estimator.start(questions_of(3, rate=[0.25, None, 0.75]), one_number)
    estimate = estimator.predict(0)
    assert estimate.mean.tolist() == [0.25, 0.5, 0.75]
    assert estimate.evidence.tolist() == [4.0, 0.0, 4.0]
    assert warnings == [
        "recorded: column 'rate' has no success rate of 1 of 3 questions; they are given the mean of the "
        "others"
    ]


def test_rates_of_a_trace_are_found_by_id_and_else_by_text(context, tmp_path):
    rows = {
        "question_id": ["q0", "other", "other"],
        "text": ["something", "text  1", "text  1"],
        "policy_version": [0, 0, 3],
        "successes": [2, 1, 4],
        "trials": [8, 2, 8],
    }
    write_trace(trace_of_rows(rows, "here"), tmp_path / "t.parquet")
    estimator = RecordedEstimator(RecordedConfig(trace=str(tmp_path / "t.parquet")), context)
    estimator.start(questions_of(2), one_number)
    assert estimator.predict(0).mean.tolist() == [0.25, 0.5]


def test_rates_that_are_none_are_refused(context):
    estimator = RecordedEstimator(RecordedConfig(column="rate"), context)
    with pytest.raises(
        ValueError, match=r"^recorded: question 'q1' has rate 35; success rates lie in \[0, 1\]$"
    ):
        estimator.start(questions_of(2, rate=[0.5, 35]), one_number)
    with pytest.raises(
        ValueError, match="^recorded: column 'rate' has a success rate of none of the 2 questions"
    ):
        estimator.start(questions_of(2), one_number)
    arithmetic = BatchArithmetic(4, 2, 2, 1, 0, 0, 16, 16)
    assert list(RecordedConfig().problems(arithmetic)) == [
        ("column", "column is None and trace is None; give one of them")
    ]


# history_and_attention

CORNERS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], np.float32)


def encoder_of(embeddings):
    return lambda texts: embeddings[[int(text.split()[1]) for text in texts]]


def with_history(context, embeddings, **options) -> HistoryAndAttentionEstimator:
    estimator = HistoryAndAttentionEstimator(HistoryAndAttentionConfig(**options), context)
    estimator.start(questions_of(len(embeddings)), encoder_of(embeddings))
    return estimator


def test_prior_and_record_are_put_together_by_hand(context):
    estimator = with_history(
        context,
        CORNERS,
        prior_rollouts=8.0,
        history_persistence=float("inf"),
        score_temperature=1 / math.log(3),
        recalibrate="none",
    )
    assert estimator.predict(0).evidence.tolist() == [0, 0, 0, 0]
    estimator.observe(observed([0, 1], [4, 8]))
    estimate = estimator.predict(0)
    # Attention says 1 of q0 (from q1 alone), 1/2 of q1, and of q3, with weights 1 and 1/3, 0.625.
    np.testing.assert_allclose(estimate.mean[[0, 1, 3]], [12 / 16, 12 / 16, 0.625], atol=1e-6)
    # Without a record: the attention's own evidence, here the least
    np.testing.assert_allclose(estimate.evidence, [16, 16, 1, 1])
    assert estimate.figures["prior_rollouts"] == 8.0
    assert "history_persistence_rollout_steps" not in estimate.figures


@pytest.mark.parametrize("references", ["training", "rolled_out"])
def test_a_question_without_a_record_has_the_estimate_of_attention_to_the_last_bit(context, references):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 8)).astype(np.float32)
    options = {"references": references, "reference_size": 20}
    attention = AttentionEstimator(AttentionConfig(**options), context)
    attention.start(questions_of(60), encoder_of(embeddings))
    both = with_history(context, embeddings, prior_rollouts=3.0, **options), attention  # 3 m / 3 is not m
    for step in range(6):
        wanted = [estimator.references(np.random.default_rng(step)) for estimator in both]
        assert wanted[0] == wanted[1]
        asked = [int(name[1:]) for name in wanted[0]] or rng.choice(40, 12, replace=False)
        asked = [place for place in asked if place < 40]
        purpose = "train" if references == "training" else "reference"
        seen = observed(asked, rng.integers(9, size=len(asked)), version=10 * step, purpose=purpose)
        for estimator in both:
            estimator.observe(seen)
        history, alone = (estimator.predict(10 * step + 5) for estimator in both)
        assert history.mean[40:].tolist() == alone.mean[40:].tolist()
        assert history.evidence[40:].tolist() == alone.evidence[40:].tolist()
        assert history.mean[asked].tolist() != alone.mean[asked].tolist()


def figures_after(context, rates_at, num_steps=40):
    """Run on 32 questions whose embeddings tell nothing, half of them measured at each step."""
    rng = np.random.default_rng(0)
    estimator = with_history(context, rng.normal(size=(32, 16)).astype(np.float32))
    for step in range(num_steps):
        chosen = rng.choice(32, 16, replace=False)
        estimator.observe(observed(chosen, rng.binomial(8, rates_at(step)[chosen]), version=step))
    return estimator.predict(num_steps).figures


def test_a_policy_that_stands_still_is_given_a_long_memory_and_one_that_jumps_a_short_one(context):
    rates = np.random.default_rng(1).beta(0.5, 0.5, 32)
    still = figures_after(context, lambda step: rates)
    jumps = figures_after(context, lambda step: rates if step // 6 % 2 else 1 - rates)
    assert still.get("history_persistence_rollout_steps", np.inf) >= 2000
    assert jumps["history_persistence_rollout_steps"] <= 100
    assert still["prior_rollouts"] <= 8


def test_a_question_that_attention_knows_gives_it_a_strong_prior(context):
    rng = np.random.default_rng(0)
    embeddings = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    rates = np.repeat([0.1, 0.4, 0.6, 0.9], 50)
    estimator = with_history(context, embeddings, history_persistence=float("inf"))
    for step in range(20):
        chosen = rng.choice(200, 20, replace=False)
        estimator.observe(observed(chosen, rng.binomial(8, rates[chosen]), version=step))
    estimate = estimator.predict(20)
    assert estimate.figures["prior_rollouts"] >= 32
    assert float(np.abs(estimate.mean - rates).max()) < 0.15


# policy_probe


@pytest.mark.parametrize("width", [3, 20])  # fewer features than groups, and more
def test_leaving_a_group_out_is_fitting_without_it(width):
    rng = np.random.default_rng(0)
    features, trials = rng.normal(size=(12, width)), rng.uniform(1, 8, 12)
    groups = ReferenceSet(np.arange(12), trials * rng.random(12), trials)
    fit = fit_ridge(features, groups)
    weights = trials / trials.mean()
    for place in range(12):
        kept = np.arange(12) != place
        design = np.column_stack([features[kept], np.ones(11)])
        penalty = np.diag([fit.penalty] * width + [0.0])
        weighted = design.T * weights[kept]
        solution = np.linalg.solve(weighted @ design + penalty, weighted @ groups.rates[kept])
        assert fit.left_out[place] == pytest.approx(features[place] @ solution[:-1] + solution[-1])
    whole = np.column_stack([features, np.ones(12)])
    weighted = whole.T * weights
    solution = np.linalg.solve(
        weighted @ whole + np.diag([fit.penalty] * width + [0.0]), weighted @ groups.rates
    )
    np.testing.assert_allclose([*fit.direction, fit.intercept], solution, atol=1e-9)


def test_the_probe_learns_a_direction_and_says_how_sure_it_is(context):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(400, 8)).astype(np.float32)
    rates = 1 / (1 + np.exp(-2 * embeddings[:, 0]))
    estimator = PolicyProbeEstimator(PolicyProbeConfig(), context)
    estimator.start(questions_of(400), encoder_of(embeddings))
    assert estimator.predict(0).evidence.tolist() == [0.0] * 400
    estimator.observe(observed(range(200), rng.binomial(8, rates[:200])))
    estimate = estimator.predict(1)
    assert np.corrcoef(estimate.mean[200:], rates[200:])[0, 1] > 0.9
    assert len(set(estimate.evidence[200:].tolist())) == 1
    assert estimate.evidence[0] == pytest.approx(estimate.evidence[300] + 8 * 2 ** (-1 / 200))


def test_the_probe_reads_what_the_length_of_a_question_tells(context):
    """Nothing beyond 12 characters is solved: a line through the length cannot say so, one that bends can."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 20, 600)
    questions = [
        replace(question, text=f"text {number} ".ljust(20 + length, "x"))
        for number, (question, length) in enumerate(zip(questions_of(600), lengths, strict=True))
    ]
    rates = np.where(lengths <= 12, 0.6, 0.0)
    found = {}
    for knots in (0, 1, 8):
        estimator = PolicyProbeEstimator(PolicyProbeConfig(length_knots=knots), context)
        estimator.start(questions, encoder_of(rng.normal(size=(600, 4)).astype(np.float32)))
        estimator.observe(observed(range(300), rng.binomial(8, rates[:300])))
        error = estimator.predict(1).mean[300:] - rates[300:]
        found[knots] = float(np.sqrt(np.mean(error**2)))
    assert found[0] > 0.25 > found[1] > 0.13 > 0.1 > found[8]


def test_lengths_bend_where_as_many_questions_lie_on_both_sides():
    columns = length_features([1, 2, 3, 4, 5, 6, 7, 100], 2)
    assert columns.shape == (8, 2)
    assert np.unique(columns[:4, 1]).size == 1, "below its knot, the median, a column is level"
    np.testing.assert_allclose(columns.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(columns.std(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "knots", "width"), [([5, 5, 5], 8, 0), ([1, 2, 3], 0, 0), ([1, 1, 2], 8, 1)]
)
def test_lengths_that_tell_nothing_are_no_columns(lengths, knots, width):
    assert length_features(lengths, knots).shape == (3, width)
