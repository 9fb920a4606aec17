"""What every selector promises."""

from __future__ import annotations

import numpy as np

from dteframe.contracts import Selector
from dteframe.records import BatchArithmetic, Group, Observation, Review, SuccessEstimate
from dteframe.testing.subject import (
    Subject,
    copy_of_state,
    group_of,
    insist,
    insist_on_storable_state,
    same_value,
)


def selection_has_exactly_as_many_distinct_questions_as_asked(subject: Subject) -> None:
    """``select`` gives ``count`` distinct questions of the estimate, plan after plan, also all of them."""
    selector = _started(subject)
    for round_number, count in enumerate((1, 5, 8, 8, 24, 8)):
        _insist_on_selection(selector, _estimate(subject), count, round_number)


def questions_that_are_missing_now_are_never_chosen(subject: Subject) -> None:
    """The estimate may cover a part of the pool, another one each time: choose among its questions only."""
    selector = _started(subject)
    for round_number in range(4):
        part = frozenset(question.id for question in subject.questions[round_number::3])
        _insist_on_selection(selector, _estimate(subject).without(part), 6, round_number)


def too_few_questions_are_refused(subject: Subject) -> None:
    """Raise ValueError when the estimate has fewer questions than asked for; never repeat one."""
    estimate = _estimate(subject)
    try:
        _started(subject).select(estimate, len(estimate.question_ids) + 1, np.random.default_rng(0))
    except ValueError:
        return
    insist(False, f"{len(estimate.question_ids) + 1} of {len(estimate.question_ids)} questions were given")


def extreme_estimates_are_safe(subject: Subject) -> None:
    """Rates of exactly 0 and 1, all rates equal and evidence of 0 are estimates like any other."""
    plain = _estimate(subject)
    number = len(plain.question_ids)
    for mean in (np.zeros(number), np.ones(number), np.arange(number) % 2.0):
        estimate = SuccessEstimate(plain.question_ids, mean, np.zeros(number))
        _insist_on_selection(_started(subject), estimate, 8, 0)


def equal_generators_give_equal_selections(subject: Subject) -> None:
    """The generator that ``select`` gets is its only source of chance."""
    estimate = _estimate(subject)
    chosen = [_started(subject).select(estimate, 8, np.random.default_rng(3)).question_ids for _ in range(2)]
    insist(chosen[0] == chosen[1], f"{chosen[0]} and {chosen[1]} from equal generators")


def estimate_is_left_as_it_is(subject: Subject) -> None:
    """The arrays of the estimate are reported after the selection: do not sort or change them in place."""
    estimate, untouched = _estimate(subject), _estimate(subject)
    _started(subject).select(estimate, 8, np.random.default_rng(0))
    insist(same_value(estimate.mean, untouched.mean), "the means were changed in place")
    insist(same_value(estimate.evidence, untouched.evidence), "the evidence was changed in place")


def state_brings_back_the_selections(subject: Subject) -> None:
    """A new selector that is given the state selects what the first one would have selected next."""
    before, after = _started(subject), _started(subject)
    estimate = _estimate(subject)
    for round_number in range(3):
        before.select(estimate, 10, np.random.default_rng(round_number))
        before.observe(_observation(subject, np.arange(6), round_number))
    insist_on_storable_state(before)
    after.load_state_dict(copy_of_state(before))
    insist(same_value(after.state_dict(), before.state_dict()), "the state changed on its way")
    for round_number in range(3, 7):
        chosen = [item.select(estimate, 7, np.random.default_rng(round_number)) for item in (before, after)]
        insist(
            chosen[0].question_ids == chosen[1].question_ids, "the resumed selector selects something else"
        )


def order_inside_an_observation_does_not_matter(subject: Subject) -> None:
    """``observe`` gets a step's questions in any order, and learns the same."""
    orders = [np.arange(6), np.arange(6)[::-1]]
    observers = [_started(subject) for _ in orders]
    for selector, order in zip(observers, orders, strict=True):
        for version in range(3):
            selector.select(_estimate(subject), 8, np.random.default_rng(version))
            selector.observe(_observation(subject, order, version))
    chosen = [
        selector.select(_estimate(subject), 8, np.random.default_rng(9)).question_ids
        for selector in observers
    ]
    insist(chosen[0] == chosen[1], f"{chosen[0]}, and {chosen[1]} after the same observations reversed")


def review_rejects_if_and_only_if_it_says_so(subject: Subject) -> None:
    """With ``reviews = False`` the engine never calls ``review``: leave it as it is, or set ``reviews``."""
    selector = _started(subject)
    if selector.reviews:
        asked = selector.config.questions_per_group(), selector.config.rounds_per_step()
        insist(asked > (1, 1), f"{asked[0]} questions a group in {asked[1]} round: a rejected group is lost")
        return
    groups = _groups(subject)
    review = selector.review(groups, len(groups))
    everything = Review(tuple(group.question_id for group in groups))
    insist(review == everything, f"reviews is False but review() gives {review}")


def review_accepts_only_groups_of_the_round(subject: Subject) -> None:
    """``review`` names questions of the groups that it got, each once, and asks for 0 more or a number."""
    selector, groups = _started(subject), _groups(subject)
    for round_groups in (groups, groups[:1], groups[3:]):
        review = selector.review(round_groups, 4)
        insist(isinstance(review, Review), f"review() gives a {type(review).__name__}")
        ids = [group.question_id for group in round_groups]
        strange = set(review.accepted) - set(ids)
        insist(not strange, f"accepted {sorted(strange)}, which are not of this round")
        insist(len(set(review.accepted)) == len(review.accepted), f"accepted twice: {review.accepted}")
        insist(review.num_more >= 0, f"asks for {review.num_more} more questions")


def _started(subject: Subject) -> Selector:
    selector: Selector = subject.make()
    selector.start(BatchArithmetic(4, 8, 8, 1, 0, 0, 64, 64))
    return selector


def _estimate(subject: Subject) -> SuccessEstimate:
    ids = tuple(question.id for question in subject.questions)
    mean = np.random.default_rng(11).random(len(ids))
    return SuccessEstimate(ids, mean, np.full(len(ids), 8.0))


def _observation(subject: Subject, order: np.ndarray, version: int) -> Observation:
    ids = [question.id for question in subject.questions[:6]]
    successes = np.array([0, 1, 8, 8, 4, 0], np.int64)
    names = tuple(ids[place] for place in order)
    return Observation(names, successes[order], np.full(6, 8, np.int64), version, "train")


def _groups(subject: Subject) -> list[Group]:
    return [group_of(question.id, place) for place, question in enumerate(subject.questions[:5])]


def _insist_on_selection(selector: Selector, estimate: SuccessEstimate, count: int, seed: int) -> None:
    ids = selector.select(estimate, count, np.random.default_rng(seed)).question_ids
    insist(len(ids) == count, f"{len(ids)} questions instead of {count}")
    insist(len(set(ids)) == count, f"{count - len(set(ids))} of {count} questions are repeated")
    unknown = set(ids) - set(estimate.question_ids)
    insist(not unknown, f"{sorted(unknown)} are not in the estimate")


PROMISES = (
    selection_has_exactly_as_many_distinct_questions_as_asked,
    questions_that_are_missing_now_are_never_chosen,
    too_few_questions_are_refused,
    extreme_estimates_are_safe,
    equal_generators_give_equal_selections,
    estimate_is_left_as_it_is,
    state_brings_back_the_selections,
    order_inside_an_observation_does_not_matter,
    review_rejects_if_and_only_if_it_says_so,
    review_accepts_only_groups_of_the_round,
)
