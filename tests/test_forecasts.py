"""Figures of a run's own forecasts, by hand; and the advice not to select."""

import json
import warnings

import numpy as np
import pytest
from tiny_run import rows, run_tiny

from dteframe.engine import advice, forecasts
from dteframe.engine.advice import lower_end
from dteframe.engine.agreement import (
    brier_floor,
    constant_nll_nats,
    nll_nats,
    pearson_ceiling,
    ranks,
    slope_with_error,
)
from dteframe.engine.forecasts import RecentForecasts
from dteframe.records import BatchArithmetic, Completion, Group, SuccessEstimate


def group(name: str, successes: int, trials: int = 4) -> Group:
    tokens = np.array([1])
    completions = tuple(Completion(tokens, np.zeros(1), "stop", "") for _ in range(trials))
    return Group(name, tokens, completions, np.zeros(trials), successes, 0, "train")


def estimate(means, evidence=1e6) -> SuccessEstimate:
    ids = tuple(f"q{place}" for place in range(len(means)))
    return SuccessEstimate(ids, np.array(means), np.full(len(means), float(evidence)))


def test_a_slope_and_its_error_by_hand():
    slope, error = slope_with_error(np.array([0.0, 0.5, 1.0]), np.array([0.25, 0.25, 1.0]))
    assert slope == pytest.approx(0.75)
    # The line is 1/8 + 3/4 x: what is left is 1/8, -1/4, 1/8, with squares 6/64, over 1 degree and 1/2
    assert error == pytest.approx(np.sqrt(6 / 64 / (1 / 2)))
    assert slope_with_error(np.full(5, 0.5), np.arange(5.0)) == (None, None)


def test_what_chance_leaves_to_a_perfect_forecast_by_hand():
    # Rates 1/2, 1, 0: chance is (1/4 + 0 + 0) / 3 / 3 = 1/36 of a variance of 1/6
    solved, tried = np.array([2.0, 4.0, 0.0]), np.array([4.0, 4.0, 4.0])
    assert brier_floor(solved, tried) == pytest.approx(1 / 36)
    assert pearson_ceiling(solved, tried) == pytest.approx(np.sqrt(5 / 6))
    assert brier_floor(solved / 4, np.ones(3)) is None and pearson_ceiling(solved / 4, np.ones(3)) is None
    assert pearson_ceiling(np.full(3, 2.0), tried) is None  # equal rates
    assert pearson_ceiling(np.array([1.0, 2.0]), np.array([2.0, 4.0])) is None  # equal rates of other counts
    assert pearson_ceiling(np.array([1.0, 2.0, 3.0]), tried) == 0.0  # less variance than chance alone has


def test_no_groups_have_no_ceiling_and_make_no_noise():
    with warnings.catch_warnings(action="error"):
        assert pearson_ceiling(np.zeros(0), np.zeros(0)) is None


def test_equal_values_share_their_rank():
    assert ranks(np.array([5.0, -1.0, 5.0, 2.0])).tolist() == pytest.approx([5 / 6, 0, 5 / 6, 1 / 3])


def test_nats_per_rollout_by_hand():
    solved, tried = np.array([2.0, 0.0]), np.array([4.0, 2.0])
    sure = nll_nats(np.array([0.5, 0.25]), np.full(2, 1e9), solved, tried)
    assert sure == pytest.approx((np.log(2) - np.log(0.75)) / 2)
    # Two of six rollouts succeed: the constant says 1/3
    constant = -(0.5 * np.log(1 / 3) + 0.5 * np.log(2 / 3) + np.log(2 / 3)) / 2
    assert constant_nll_nats(solved, tried) == pytest.approx(constant)


def test_few_groups_have_no_figures():
    recent = RecentForecasts()
    assert recent.report().metrics() == {
        "forecast/num_groups": 0,
        "forecast/num_chosen_groups": 0,
        "forecast/num_uniform_groups": 0,
    }
    groups = [group(f"q{place}", 2) for place in range(31)]
    recent.note(estimate([0.5] * 31), groups, np.zeros(31, bool))
    assert set(recent.report().metrics().values()) == {31, 0}


def test_chosen_and_uniform_groups_are_counted_apart_and_scored_together(monkeypatch):
    monkeypatch.setattr(forecasts, "MIN_FORECASTS", 2)
    monkeypatch.setattr(forecasts, "WINDOW", 3)
    recent = RecentForecasts()
    recent.note(None, [group("q0", 4), group("q1", 0)], np.ones(2, bool))  # nothing was predicted
    groups = [group("q0", 4), group("q1", 0), group("q2", 2), group("q3", 2)]
    recent.note(estimate([1.0, 0.0, 0.5, 0.5]), groups, np.array([False, False, True, True]))
    report = recent.report()
    assert (report.num_groups, report.num_chosen_groups, report.num_uniform_groups) == (4, 2, 3)
    assert (report.chosen_informative_fraction, report.uniform_informative_fraction) == (0.0, 2 / 3)
    assert (report.pearson, report.brier, report.slope) == pytest.approx((1.0, 0.0, 1.0))
    assert (report.spearman, report.brier_floor) == pytest.approx((1.0, 1 / 24))  # 1/4 of 3, of two in four
    assert report.pearson_ceiling == pytest.approx(np.sqrt(1 - (1 / 24) / (1 / 8)))
    assert report.nll_nats < report.constant_nll_nats
    again = RecentForecasts.from_state(recent.state_dict())
    assert again.report() == report


def test_the_best_gain_by_hand():
    free = BatchArithmetic(10, 32, 8, 4, 0, 0, 64, 64)
    assert free.best_gain(0.5, reuses_references=True) == pytest.approx(2.0)
    dear = BatchArithmetic(10, 32, 8, 4, 16, 32, 64, 64)  # 16 fresh groups a step, 64 a plan, 32 references
    assert dear.best_gain(0.5, reuses_references=False) == pytest.approx(64 / 96 / 0.5)
    assert dear.best_gain(0.5, reuses_references=True) == pytest.approx(64 / (64 - 16 + 32) / 0.5)
    # 128 / (128 * u) >= 1.25 up to 0.8; with references 64 / 80 / u, once 16 of them are reused
    assert free.break_even(reuses_references=True) == 0.8
    assert dear.break_even(reuses_references=True) == 0.64


def test_the_lower_end_of_a_share_is_wilsons():
    assert lower_end(1.0, 64) == pytest.approx(64 / (64 + 1.96**2))
    assert lower_end(0.5, 100) == pytest.approx(0.4038, abs=1e-4)


def test_a_run_tells_once_that_selection_can_hardly_pay_and_shows_its_forecasts(tmp_path, monkeypatch):
    monkeypatch.setattr(advice, "LEAST_GAIN", 1000.0)
    monkeypatch.setattr(advice, "MIN_GROUPS", 32)
    summary = run_tiny(tmp_path, "training.max_steps=8", "training.evaluate_every=0")
    told = [message for message in summary.warnings if message.startswith("selection can hardly pay: ")]
    assert len(told) == 1
    assert "of 32 uniformly drawn groups are informative (at least " in told[0]
    assert (
        "times as many per rollout, references included, as a uniform one; take harder questions" in told[0]
    )
    row = rows(tmp_path, "metrics")[-1]
    assert row["forecast/num_uniform_groups"] == 4 * 8  # the references of four plans
    assert (
        row["forecast/num_groups"] == row["forecast/num_chosen_groups"] + 3 * 8
    )  # the first were not predicted
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["cost/reference_seconds"] > 0


def test_a_run_that_expects_too_little_of_choosing_draws_uniformly_and_says_so(tmp_path):
    rules = ("selector.least_gain=100", "training.evaluate_every=0", "training.max_steps=4")
    run_tiny(tmp_path, *rules)
    plans = [row for row in rows(tmp_path, "metrics") if "estimate/expected_gain" in row]
    assert len(plans) == 2
    for row in plans:
        assert 0.5 < row["estimate/expected_gain"] < 100
        assert row["estimate/coverage_questions"] == row["estimate/num_selected"] > 0
    last = rows(tmp_path, "metrics")[-1]
    assert last["forecast/num_chosen_groups"] == 0
    assert last["forecast/num_uniform_groups"] > 2 * 8  # besides the references
