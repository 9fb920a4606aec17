"""Easiness: level and slope of a policy, and the ridge regression over embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from dteframe.estimators.easiness import (
    Prior,
    fit_easiness,
    fit_level_and_slope,
    question_targets,
    sigmoid,
)
from dteframe.estimators.references import ReferenceSet


def references_of(successes, trials) -> ReferenceSet:
    return ReferenceSet(np.arange(len(trials)), np.array(successes), np.array(trials))


def test_one_right_answer_in_two_at_easiness_0_is_level_0_and_slope_1():
    level, slope = fit_level_and_slope(np.zeros(4), np.full(4, 0.5), np.full(4, 8))
    assert (float(level), float(slope)) == (0.0, 1.0)


def test_many_questions_tell_level_and_slope():
    easiness = np.linspace(-2, 2, 4001)
    level, slope = fit_level_and_slope(easiness, sigmoid(0.7 + 0.5 * easiness), np.full(4001, 8))
    assert float(level) == pytest.approx(0.7, abs=0.01)
    assert float(slope) == pytest.approx(0.5, abs=0.01)


def test_few_questions_leave_the_slope_near_1():
    # Two questions that disagree with their easiness: the likelihood alone would turn the slope round.
    _, slope = fit_level_and_slope(np.array([-1.0, 1.0]), np.array([1.0, 0.0]), np.array([1, 1]))
    assert 0.5 < float(slope) < 1.0


def test_several_weightings_at_once_are_those_one_by_one():
    rng = np.random.default_rng(0)
    easiness, rates = rng.normal(size=9), rng.random(9)
    trials = rng.integers(0, 9, (3, 9)).astype(float)
    level, slope = fit_level_and_slope(easiness, rates, trials)
    single = [fit_level_and_slope(easiness, rates, row) for row in trials]
    np.testing.assert_allclose(level, [item[0] for item in single])
    np.testing.assert_allclose(slope, [item[1] for item in single])


def test_a_reference_is_predicted_without_its_own_rate():
    scores, easiness = np.zeros((3, 3)), np.array([-1.0, 0.0, 1.0])
    high, low = (Prior(easiness, references_of([own, 4, 6], [8, 8, 8])) for own in (8, 0))
    assert high.left_out(scores)[0] == pytest.approx(low.left_out(scores)[0])
    assert high.left_out(scores)[1] > low.left_out(scores)[1]


def test_a_single_reference_has_no_others():
    prior = Prior(np.array([0.4]), references_of([8], [8]))
    assert prior.left_out(np.zeros((1, 1))).tolist() == pytest.approx([float(sigmoid(np.array(0.4)))])


def test_a_questions_target_is_its_rate_above_the_policies_means():
    # 8 rollouts count half, 24 three quarters. The first policy's mean is 0.5, the second's 0.25 x 1 = 0.25.
    successes, trials = np.array([[8, 0], [6, 0]]), np.array([[8, 8], [24, 0]])
    targets, weights = question_targets(successes, trials)
    np.testing.assert_allclose(targets, [(0.5 * 0.5 + 0.75 * 0.0) / 1.25, -0.5])
    np.testing.assert_allclose(weights / weights[1], [2.5, 1.0])


def learnable(num_questions=400):
    """Easiness is the first column of the second part; the first part is noise."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(num_questions, 34))
    successes = rng.binomial(16, sigmoid(1.5 * embeddings[:, 32]))
    return embeddings, successes[None], np.full((1, num_questions), 16)


def test_the_part_that_tells_something_gets_the_larger_gain():
    embeddings, successes, trials = learnable()
    fitted = fit_easiness(embeddings, [32, 2], successes, trials, np.arange(400) % 5)
    assert fitted.gains == (1.0, 4.0)
    assert fitted.easiness.of(embeddings) == pytest.approx(1.5 * embeddings[:, 32], abs=0.6)


def test_what_is_left_out_says_nothing_of_rates_that_are_chance():
    embeddings, _, trials = learnable()
    successes = np.random.default_rng(1).binomial(16, 0.5, (1, 400))
    fitted = fit_easiness(embeddings, [34], successes, trials, np.arange(400) % 5)
    assert np.abs(fitted.left_out).max() < 0.2
    assert fitted.penalty == 300.0


def test_a_column_that_never_changes_is_ignored():
    embeddings, successes, trials = learnable()
    embeddings[:, 0] = 7.0
    fitted = fit_easiness(embeddings, [34], successes, trials, np.arange(400) % 5)
    embeddings[:, 0] = 1e6
    assert np.isfinite(fitted.easiness.of(embeddings)).all()
