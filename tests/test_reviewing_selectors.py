"""Selectors that look back: streaks of groups without signal, and groups that are turned away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dteframe import Context, Observation, Review, SuccessEstimate
from dteframe.selectors.dynamic_sampling import DynamicSamplingConfig, DynamicSamplingSelector
from dteframe.selectors.skip_zero_variance import (
    SkipZeroVarianceConfig,
    SkipZeroVarianceSelector,
    steered,
)
from dteframe.testing.subject import group_of

CONTEXT = Context(Path("unused"), Path("unused"), "cpu", 0, lambda *_: None, lambda _: None)


def pool_of(*names: str) -> SuccessEstimate:
    return SuccessEstimate(names, np.full(len(names), 0.5), np.zeros(len(names)))


def observed(successes: dict[str, int], trials: int = 4) -> Observation:
    counts = np.array(list(successes.values()), np.int64)
    return Observation(tuple(successes), counts, np.full(len(counts), trials), 0, "train")


def skipping(**options) -> SkipZeroVarianceSelector:
    return SkipZeroVarianceSelector(SkipZeroVarianceConfig(**options), CONTEXT)


def sampling(**options) -> DynamicSamplingSelector:
    return DynamicSamplingSelector(DynamicSamplingConfig(**options), CONTEXT)


# skip_zero_variance


def test_before_anything_is_measured_every_question_is_asked_once_per_epoch():
    selector, pool = skipping(), pool_of(*"abcdef")
    rng = np.random.default_rng(0)
    asked = [name for _ in range(3) for name in selector.select(pool, 2, rng).question_ids]
    assert sorted(asked) == list("abcdef")


def test_a_streak_of_one_kind_grows_and_ends_with_the_other_kind_or_a_mixed_group():
    selector = skipping()
    for successes in (4, 4):
        selector.observe(observed({"easy": successes, "turns": successes, "mixed": successes}))
    selector.observe(observed({"easy": 4, "turns": 0, "mixed": 2, "hard": 0}))
    state = selector.state_dict()
    streaks = dict(zip(state["streak_ids"], state["streaks"].tolist(), strict=True))
    assert streaks == {"easy": 3, "turns": -1, "hard": -1}


def test_a_question_is_asked_with_chance_base_to_the_power_of_its_streak():
    # Of "easy" (z = 1) and "fair" (z = 0) one is asked: "easy" if it comes first (1/2) and is not skipped
    # (1/2), or if "fair" were skipped, which never is: 1/4.
    rng, counts = np.random.default_rng(0), {"easy": 0, "fair": 0}
    for _ in range(4000):
        selector = skipping()
        selector.observe(observed({"easy": 4}))
        counts[selector.select(pool_of("easy", "fair"), 1, rng).question_ids[0]] += 1
    assert counts["easy"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_the_longest_streak_leaves_a_chance_of_one_in_a_hundred():
    selector = skipping()
    for _ in range(20):
        selector.observe(observed({"hard": 0}))
    rng = np.random.default_rng(0)
    state = selector.state_dict()
    asked = 0
    for _ in range(5_000):
        selector.load_state_dict(state)
        asked += selector.select(pool_of("fair", "hard"), 1, rng).question_ids == ("hard",)
    assert asked / 5_000 == pytest.approx(0.005, abs=0.003)  # first in half of the orders


def test_a_skipped_question_has_had_its_turn_in_the_epoch():
    selector = skipping()
    for _ in range(20):
        selector.observe(observed({"hard": 0}))
    rng = np.random.default_rng(1)
    asked = [
        name
        for _ in range(3)
        for name in selector.select(pool_of("a", "b", "c", "hard"), 1, rng).question_ids
    ]
    assert sorted(asked) == ["a", "b", "c"]
    # Only "hard" may be left of the epoch, and it is skipped: the next epoch begins.
    assert selector.select(pool_of("a", "b", "c", "hard"), 1, rng).question_ids[0] in "abc"
    assert selector.state_dict()["is_first_epoch"] is False


def test_where_all_are_skipped_the_pool_is_gone_through_again_until_there_are_enough():
    selector = skipping()
    for _ in range(9):
        selector.observe(observed(dict.fromkeys("abcd", 0)))
    chosen = selector.select(pool_of(*"abcd"), 4, np.random.default_rng(0)).question_ids
    assert sorted(chosen) == list("abcd")


def test_bases_move_against_their_targets_and_stay_within_bounds():
    assert steered(0.5, fraction=0.3, target=0.25) == 0.49
    assert steered(0.5, fraction=0.25, target=0.25) == 0.49
    assert steered(0.5, fraction=0.2, target=0.25) == 0.51
    assert steered(0.05, fraction=1.0, target=0.25) == 0.05
    assert steered(0.95, fraction=0.0, target=0.25) == 0.95


def test_bases_are_steered_by_kind_once_the_first_epoch_is_over():
    selector, pool = skipping(target_fraction=0.3), pool_of(*"abcd")  # easy 0.1, hard 0.2
    selector.observe(observed({"a": 4, "b": 2, "c": 2, "d": 2}))
    assert (selector.state_dict()["base_easy"], selector.state_dict()["base_hard"]) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    for _ in range(3):
        selector.select(pool, 3, rng)
    selector.observe(observed({"a": 4, "b": 2, "c": 2, "d": 2}))
    assert (selector.state_dict()["base_easy"], selector.state_dict()["base_hard"]) == (0.49, 0.51)


@given(seed=st.integers(0, 500), counts=st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_any_choice_has_distinct_questions_and_goes_on_after_a_checkpoint(seed, counts):
    names = list("abcdefgh")
    rng = np.random.default_rng(seed)
    before, after = skipping(), skipping()
    for number, count in enumerate(counts):
        after.load_state_dict(before.state_dict())
        draws = [
            one.select(pool_of(*names), count, np.random.default_rng([seed, number]))
            for one in (before, after)
        ]
        assert draws[0] == draws[1]
        assert len(set(draws[0].question_ids)) == count
        before.observe(observed({name: int(rng.integers(5)) for name in draws[0].question_ids}))


def test_more_questions_than_there_are_is_an_error():
    message = "^skip_zero_variance: asked for 3 of 2 questions; at most all of them can be given$"
    with pytest.raises(ValueError, match=message):
        skipping().select(pool_of("a", "b"), 3, np.random.default_rng(0))


# dynamic_sampling


def test_groups_of_equal_rewards_are_rejected_and_asked_for_again():
    groups = [group_of("never", 0), group_of("once", 1), group_of("always", 4), group_of("mostly", 3)]
    review = sampling(oversampling=1.5).review(groups, num_missing=5)
    assert review == Review(("once", "mostly"), num_more=5)  # 3 are still missing; ceil(3 x 1.5)


def test_a_full_step_asks_for_no_more():
    groups = [group_of("once", 1), group_of("twice", 2), group_of("mostly", 3)]
    assert sampling().review(groups, num_missing=2) == Review(("once", "twice", "mostly"), num_more=0)


def test_the_paper_asks_three_questions_for_each_group_in_ten_rounds():
    config = DynamicSamplingConfig()
    assert (config.questions_per_group(), config.rounds_per_step()) == (3.0, 10)
