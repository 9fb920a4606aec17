"""The prioritised buffer: who is preferred, who leaves, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dteframe import BatchArithmetic, Context
from dteframe.replay.prioritised import PrioritisedConfig, PrioritisedReplay
from dteframe.testing.subject import group_of

CONTEXT = Context(Path("unused"), Path("unused"), "cpu", 0, lambda *_: None, lambda _: None)
NOBODY: frozenset[str] = frozenset()


def prioritised(**options) -> PrioritisedReplay:
    return PrioritisedReplay(PrioritisedConfig(**options), CONTEXT)


def share_of_first(groups, version, **options) -> float:
    """Draw one of two groups 4,000 times from a fresh buffer."""
    rng, count = np.random.default_rng(0), 0
    for _ in range(4000):
        buffer = prioritised(**options)
        buffer.offer(groups)
        count += buffer.draw(1, version, NOBODY, rng)[0].question_id == groups[0].question_id
    return count / 4000


def test_groups_are_drawn_by_the_variance_of_their_successes():
    # 1/2 x 1/2 = 4/16 against 1/4 x 3/4 = 3/16.
    groups = [group_of("half", 2), group_of("quarter", 1)]
    assert share_of_first(groups, 0) == pytest.approx(4 / 7, abs=0.025)


def test_a_group_loses_weight_with_its_age():
    # Two versions apart at freshness_steps 2: 1 to exp(-1).
    groups = [group_of("new", 2, policy_version=3), group_of("old", 2, policy_version=1)]
    share = share_of_first(groups, 4, freshness_steps=2.0)
    assert share == pytest.approx(np.e / (np.e + 1), abs=0.025)


def test_only_groups_with_successes_and_failures_enter():
    buffer = prioritised()
    buffer.offer([group_of("never", 0), group_of("always", 4), group_of("once", 1)])
    assert [group.question_id for group in buffer.draw(9, 0, NOBODY, np.random.default_rng(0))] == ["once"]


def test_what_is_worth_least_leaves_a_full_buffer():
    buffer = prioritised(capacity=2, freshness_steps=1.0)
    buffer.offer([group_of("old half", 2, policy_version=0), group_of("new quarter", 1, policy_version=1)])
    # 4/16 exp(-1) = 0.09 against 3/16 = 0.19 and 4/16: the age outweighs the variance.
    buffer.offer([group_of("new half", 2, policy_version=1)])
    drawn = buffer.draw(9, 1, NOBODY, np.random.default_rng(0))
    assert {group.question_id for group in drawn} == {"new quarter", "new half"}


def test_a_group_leaves_when_it_is_used_up_or_too_stale():
    buffer = prioritised(max_uses=2, max_staleness=3)
    buffer.offer([group_of("a", 2, policy_version=0)])
    rng = np.random.default_rng(0)
    assert [len(buffer.draw(1, version, NOBODY, rng)) for version in (1, 2, 3)] == [1, 1, 0]
    buffer.offer([group_of("b", 2, policy_version=0)])
    assert (buffer.num_ready(3), buffer.num_ready(4)) == (1, 0)
    assert buffer.draw(1, 4, NOBODY, rng) == []


def test_very_old_groups_can_still_be_drawn():
    # exp(-5000) is 0 in floats: weights are compared as logarithms.
    buffer = prioritised(freshness_steps=0.2, max_staleness=None)
    buffer.offer([group_of("a", 2), group_of("b", 1)])
    assert len(buffer.draw(2, 1000, NOBODY, np.random.default_rng(0))) == 2


def test_a_capacity_below_a_steps_share_is_a_problem():
    arithmetic = BatchArithmetic(10, 32, 8, 2, 16, 32, 512, 256)
    assert [key for key, _ in PrioritisedConfig(capacity=15).problems(arithmetic)] == ["capacity"]
    assert list(PrioritisedConfig(capacity=16).problems(arithmetic)) == []
