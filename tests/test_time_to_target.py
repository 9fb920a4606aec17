"""Time to target: passages, smoothings and intervals by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dteframe.experiments.time_to_target import (
    Passage,
    first_passage,
    log_ratios,
    paired_interval,
    paper_smoothing,
    saved,
    trailing_mean,
    value_at,
)

COSTS = np.array([0.0, 10.0, 20.0, 30.0])


def test_a_trailing_mean_begins_when_the_window_is_full():
    means = trailing_mean(np.array([0.0, 0.3, 0.6, 0.9]), 3)
    assert np.isnan(means[:2]).all()
    assert means[2:] == pytest.approx([0.3, 0.6])


def test_the_passage_lies_between_the_two_evaluations_around_the_target():
    assert first_passage(np.array([0.0, 0.2, 0.6, 0.8]), COSTS, 0.3) == 12.5


def test_only_the_first_passage_counts_even_if_the_curve_falls_again():
    assert first_passage(np.array([0.0, 0.5, 0.1, 0.9]), COSTS, 0.5) == 10.0


def test_a_curve_that_never_reaches_the_target_has_no_passage():
    assert first_passage(np.array([0.0, 0.2, 0.3, 0.4]), COSTS, 0.5) is None


def test_a_curve_that_has_no_value_yet_has_no_passage():
    assert first_passage(np.array([np.nan, np.nan]), COSTS[:2], 0.0) is None


def test_a_curve_that_begins_above_the_target_passes_at_its_first_value():
    assert first_passage(np.array([np.nan, 0.6, 0.7, 0.8]), COSTS, 0.5) == 10.0


def test_the_papers_smoothing_of_two_values_is_nearly_their_mean_and_leans_to_the_newer():
    first, second = paper_smoothing(np.array([0.0, 1.0]))
    weight = 1 - 2 ** (-1 / 40)
    assert first == 0.0
    assert second == pytest.approx(weight / (1 - (1 - weight) ** 2))
    assert 0.5 < second < 0.51


@given(st.floats(0, 1), st.integers(1, 30))
def test_the_papers_smoothing_leaves_a_constant_alone(value, count):
    assert paper_smoothing(np.full(count, value)) == pytest.approx(np.full(count, value))


def test_a_curve_is_read_between_evaluations_and_held_beyond_the_last():
    curve = np.array([np.nan, 0.2, 0.4, 0.8])
    assert value_at(curve, COSTS, 25.0) == pytest.approx(0.6)
    assert value_at(curve, COSTS, 99.0) == 0.8
    assert value_at(curve, COSTS, 0.0) == 0.2


def test_half_the_cost_in_each_pair_saves_half():
    arm = [Passage(5.0, False), Passage(8.0, False)]
    baseline = [Passage(10.0, False), Passage(16.0, False)]
    interval = paired_interval(log_ratios(arm, baseline))
    assert [saved(value) for value in (interval.mean, interval.low, interval.high)] == pytest.approx(
        [0.5] * 3
    )


def test_a_run_that_never_reaches_the_target_counts_at_all_that_it_paid():
    assert log_ratios([Passage(20.0, True)], [Passage(10.0, False)]) == pytest.approx([np.log(2)])


def test_twice_the_cost_saves_less_than_nothing():
    assert saved(np.log(2)) == pytest.approx(-1.0)


def test_one_pair_says_nothing_about_the_spread():
    interval = paired_interval([0.3])
    assert (interval.mean, interval.low, interval.high) == (0.3, None, None)


def test_an_interval_without_pairs_is_refused():
    with pytest.raises(ValueError, match="an interval needs at least one pair of runs"):
        paired_interval([])


def test_below_five_pairs_the_interval_is_students():
    # Of 1, 2, 3: mean 2, standard deviation 1, and 4.303 standard errors to each side.
    interval = paired_interval([1.0, 2.0, 3.0])
    half = 4.303 / np.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


@given(st.lists(st.floats(-3, 3), min_size=5, max_size=12))
def test_an_interval_holds_its_mean_and_stays_within_the_data(values):
    interval = paired_interval(values)
    assert min(values) - 1e-9 <= interval.low <= interval.mean + 1e-9
    assert interval.mean - 1e-9 <= interval.high <= max(values) + 1e-9
