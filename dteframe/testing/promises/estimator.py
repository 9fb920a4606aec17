"""What every estimator promises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dteframe.contracts import Estimator
from dteframe.records import Observation, Purpose, Question, SuccessEstimate
from dteframe.testing.subject import (
    Subject,
    copy_of_state,
    insist,
    insist_on_storable_state,
    letters_of,
    same_value,
)
from dteframe.testing.tiny import tiny_questions

TRIALS = 8


def references_are_as_announced(subject: Subject) -> None:
    """``references`` names distinct questions of the pool, ``config.num_references()`` of them."""
    estimator, pool = _started(subject)
    ids = list(estimator.references(np.random.default_rng(1)))
    announced = estimator.config.num_references()
    insist(len(ids) == announced, f"{len(ids)} references, but num_references() announces {announced}")
    insist(len(set(ids)) == len(ids), "a reference is named twice")
    unknown = set(ids) - {question.id for question in pool}
    insist(not unknown, f"unknown references {sorted(unknown)}")


def equal_generators_give_equal_references(subject: Subject) -> None:
    """The generator that ``references`` gets is its only source of chance."""
    answers = [list(_started(subject)[0].references(np.random.default_rng(7))) for _ in range(2)]
    insist(answers[0] == answers[1], f"{answers[0]} and {answers[1]} from equal generators")


def prediction_covers_every_question_once(subject: Subject) -> None:
    """``predict`` names each question of the pool exactly once, with one mean and one evidence each."""
    estimator, pool = _started(subject)
    for estimate in (_plan(estimator, pool, 0), _plan(estimator, pool, 1)):
        ids = estimate.question_ids
        insist(
            sorted(ids) == sorted(question.id for question in pool),
            f"{len(ids)} ids for {len(pool)} questions",
        )
        shapes = estimate.mean.shape, estimate.evidence.shape
        insist(shapes == ((len(pool),), (len(pool),)), f"shapes {shapes} for {len(pool)} questions")


def predicted_means_are_success_rates(subject: Subject) -> None:
    """Means are finite and in [0, 1], evidence is finite and 0 or more, figures are finite."""
    estimator, pool = _started(subject)
    for version in range(3):
        estimate = _plan(estimator, pool, version)
        inside = np.isfinite(estimate.mean).all() and ((estimate.mean >= 0) & (estimate.mean <= 1)).all()
        insist(inside, f"means from {estimate.mean.min()} to {estimate.mean.max()}")
        known = np.isfinite(estimate.evidence).all() and (estimate.evidence >= 0).all()
        insist(known, f"evidence from {estimate.evidence.min()} to {estimate.evidence.max()}")
        wrong = {name: figure for name, figure in estimate.figures.items() if not np.isfinite(figure)}
        insist(not wrong, f"figures {wrong}; leave out what cannot be computed")


def asking_again_changes_nothing(subject: Subject) -> None:
    """``predict`` called twice gives the same estimate: it learns from ``observe`` alone."""
    estimator, pool = _started(subject)
    first, second = _plan(estimator, pool, 0), estimator.predict(0)
    insist(_same(first, second), "the second prediction differs from the first")


def order_inside_an_observation_does_not_matter(subject: Subject) -> None:
    """The questions of one observation were measured at the same time: their order must not count."""
    estimates = []
    for order in (1, -1):
        estimator, pool = _started(subject)
        _plan(estimator, pool, 0)
        estimator.observe(_measured([question.id for question in pool[:9]][::order], 1, "train"))
        estimates.append(estimator.predict(2))
    insist(_same(*estimates), "the reversed observation gives another prediction")


def unknown_questions_are_refused(subject: Subject) -> None:
    """``observe`` raises ValueError and names a question that is not in the pool."""
    estimator, _ = _started(subject)
    try:
        estimator.observe(_measured(["no-such-question"], 0, "train"))
    except ValueError as error:
        insist("no-such-question" in str(error), f"the error does not name the question: {error}")
        return
    insist(False, "an observation of the unknown question 'no-such-question' was taken without a word")


def state_brings_back_the_predictions(subject: Subject) -> None:
    """A new estimator that was started and given the state predicts the same, now and later."""
    before, pool = _started(subject)
    _plan(before, pool, 0)
    before.observe(_measured([question.id for question in pool[:5]], 1, "train"))
    insist_on_storable_state(before)
    after, _ = _started(subject)
    after.load_state_dict(copy_of_state(before))
    insist(same_value(after.state_dict(), before.state_dict()), "the state changed on its way")
    insist(_same(before.predict(2), after.predict(2)), "the resumed estimator predicts something else")
    insist(
        _same(_plan(before, pool, 2), _plan(after, pool, 2)), "the resumed estimator learns something else"
    )


def _started(subject: Subject) -> tuple[Estimator, tuple[Question, ...]]:
    estimator: Estimator = subject.make()
    wanted = max(len(subject.questions), 2 * estimator.config.num_references())
    pool = subject.questions if wanted == len(subject.questions) else tiny_questions(wanted)
    estimator.start(pool, letters_of)
    return estimator, pool


def _plan(estimator: Estimator, pool: Sequence[Question], version: int) -> SuccessEstimate:
    """Do what the engine does for a plan: roll out the references, then predict."""
    references = list(estimator.references(np.random.default_rng(version)))
    if references:
        estimator.observe(_measured(references, version, "reference"))
    return estimator.predict(version)


def _measured(ids: Sequence[str], version: int, purpose: Purpose) -> Observation:
    successes = np.array([sum(name.encode()) % (TRIALS + 1) for name in ids], dtype=np.int64)
    return Observation(tuple(ids), successes, np.full(len(ids), TRIALS, dtype=np.int64), version, purpose)


def _same(one: SuccessEstimate, other: SuccessEstimate) -> bool:
    places = {name: place for place, name in enumerate(other.question_ids)}
    order = [places[name] for name in one.question_ids]
    means = np.allclose(one.mean, other.mean[order], rtol=0, atol=1e-9)
    return means and np.allclose(one.evidence, other.evidence[order], rtol=1e-9, atol=1e-9)


PROMISES = (
    references_are_as_announced,
    equal_generators_give_equal_references,
    prediction_covers_every_question_once,
    predicted_means_are_success_rates,
    asking_again_changes_nothing,
    order_inside_an_observation_does_not_matter,
    unknown_questions_are_refused,
    state_brings_back_the_predictions,
)
