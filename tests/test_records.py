"""What records say about themselves."""

from __future__ import annotations

import numpy as np
import pytest

from dteframe import Question, SuccessEstimate
from dteframe.engine.pool import Pool

ESTIMATE = SuccessEstimate(
    ("c", "a", "d", "b"), np.array([0.3, 0.1, 0.4, 0.2]), np.arange(4.0), {"slope": 1.0}
)


def shown(estimate: SuccessEstimate) -> list[tuple[str, float, float]]:
    return list(zip(estimate.question_ids, estimate.mean.tolist(), estimate.evidence.tolist(), strict=True))


def test_an_estimate_in_order_has_ascending_ids_and_the_same_numbers():
    ordered = ESTIMATE.in_order()
    assert shown(ordered) == [("a", 0.1, 1.0), ("b", 0.2, 3.0), ("c", 0.3, 0.0), ("d", 0.4, 2.0)]
    assert ordered.figures == {"slope": 1.0} and ordered.is_ascending and not ESTIMATE.is_ascending
    assert ordered.in_order() is ordered


def test_the_pool_puts_its_own_estimates_into_order_and_any_others_too():
    questions = {name: Question(name, name, name, "") for name in ESTIMATE.question_ids}
    pool = Pool(questions, {}, {})
    again = SuccessEstimate(("d", "c", "b", "a"), np.array([0.4, 0.3, 0.2, 0.1]), np.array([2.0, 0, 3, 1]))
    assert shown(pool.in_order(ESTIMATE)) == shown(pool.in_order(again)) == shown(ESTIMATE.in_order())
    assert pool.in_order(ESTIMATE).question_ids is pool.in_order(ESTIMATE).question_ids


@pytest.mark.parametrize("estimate", [ESTIMATE, ESTIMATE.in_order()], ids=["any order", "ascending"])
def test_questions_are_found_left_out_and_looked_up_in_any_order(estimate):
    found = estimate.places(["d", "unknown", "", "zzz", "a"])
    assert [estimate.question_ids[place] for place in found] == ["d", "a"]
    assert sorted(shown(estimate.without(frozenset({"d", "a", "unknown"})))) == [
        ("b", 0.2, 3.0),
        ("c", 0.3, 0.0),
    ]
    assert estimate.without(frozenset({"d"})).is_ascending == estimate.is_ascending
    assert shown(estimate.restricted(("d", "a"))) == [("d", 0.4, 2.0), ("a", 0.1, 1.0)]
    assert not estimate.restricted(("d", "a")).is_ascending
    assert shown(estimate.without(frozenset("abcd"))) == []


def test_looking_up_a_question_that_is_not_there_is_a_bug():
    with pytest.raises(AssertionError):
        ESTIMATE.restricted(("a", "unknown"))
