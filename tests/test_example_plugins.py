"""The plugins that the guides walk through: what they compute, and that they keep their promises."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dteframe import Observation
from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject, completion_of, letters_of
from dteframe.testing.tiny import tiny_questions

PLUGINS = Path(__file__).parents[1] / "plugins"
REGISTRY = load_registry([PLUGINS])


def example(kind: str, name: str, folder: Path) -> Subject:
    return Subject(REGISTRY.get(kind, name), folder)


@pytest.fixture
def estimator(tmp_path):
    estimator = example("estimator", "running_average", tmp_path).make()
    estimator.start(tiny_questions(3), letters_of)
    return estimator


def observed(estimator, question_id, successes, trials, version=0):
    counts = np.array([successes]), np.array([trials])
    estimator.observe(Observation((question_id,), *counts, version, "train"))
    return estimator.predict(version + 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("estimator", "running_average"), ("reward", "length_penalty"), ("selector", "balanced_groups")],
)
def test_examples_keep_every_promise(kind, name, tmp_path):
    assert check_component(REGISTRY.get(kind, name), tmp_path) == []


def test_a_question_that_was_never_asked_has_the_prior(estimator):
    estimate = estimator.predict(0)
    assert estimate.mean.tolist() == [0.5, 0.5, 0.5]
    assert estimate.evidence.tolist() == [2.0, 2.0, 2.0]
    assert estimate.figures == {"num_questions_asked": 0.0}


def test_prior_and_counts_are_blended(estimator):
    """(2 x 0.5 + 1) / (2 + 4) = 1/3, worth 6 rollouts."""
    estimate = observed(estimator, "sum-001", 1, 4)
    assert estimate.mean.tolist() == [0.5, 1 / 3, 0.5]
    assert estimate.evidence.tolist() == [2.0, 6.0, 2.0]
    assert estimate.figures == {"num_questions_asked": 1.0}


def test_earlier_rollouts_count_for_less(estimator):
    """(1 + 0.9 x 1 + 3) / (2 + 0.9 x 4 + 4) = 4.9 / 9.6."""
    observed(estimator, "sum-001", 1, 4)
    estimate = observed(estimator, "sum-001", 3, 4, version=1)
    assert estimate.mean[1] == pytest.approx(4.9 / 9.6)
    assert estimate.evidence[1] == pytest.approx(9.6)


def test_an_unknown_question_is_named_and_changes_nothing(estimator):
    with pytest.raises(ValueError, match="^question 'sum-999' is not in the pool$"):
        observed(estimator, "sum-999", 1, 4)
    assert estimator.predict(0).evidence.tolist() == [2.0, 2.0, 2.0]


def test_a_resumed_estimator_may_hold_the_questions_in_another_order(estimator, tmp_path):
    observed(estimator, "sum-001", 4, 4)
    resumed = example("estimator", "running_average", tmp_path).make()
    resumed.start(tiny_questions(3)[::-1], letters_of)
    resumed.load_state_dict(estimator.state_dict())
    estimate = resumed.predict(1)
    assert dict(zip(estimate.question_ids, estimate.mean, strict=True))["sum-001"] == pytest.approx(5 / 6)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_the_mean_stays_between_prior_and_what_was_measured(tmp_path_factory, successes):
    estimator = example("estimator", "running_average", tmp_path_factory.getbasetemp()).make()
    estimator.start(tiny_questions(1), letters_of)
    for version, number in enumerate(successes):
        estimate = observed(estimator, "sum-000", number, 8, version)
    rates = [0.5, *(number / 8 for number in successes)]
    assert min(rates) - 1e-12 <= estimate.mean[0] <= max(rates) + 1e-12


@pytest.mark.parametrize(
    ("length", "score"), [(1, 0.0), (64, 0.0), (65, -1 / 192), (160, -0.5), (256, -1.0), (999, -1.0)]
)
def test_the_penalty_grows_in_a_straight_line(length, score, tmp_path):
    reward = example("reward", "length_penalty", tmp_path).make()
    completion = completion_of("7" * (length - 1))  # and an end token
    assert reward.score(tiny_questions(1)[0], [completion]) == [pytest.approx(score)]


def test_a_penalty_that_cannot_grow_is_refused():
    config = REGISTRY.get("reward", "length_penalty").config
    with pytest.raises(
        ValidationError, match="full_penalty_tokens is 64 and free_tokens 64; the penalty must grow"
    ):
        config(free_tokens=64, full_penalty_tokens=64)
