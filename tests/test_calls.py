"""Components that break their contracts are named, with what they gave."""

import numpy as np
import pytest

from dteframe.contracts import Estimator, Replay, Reward, Selector, SelectorConfig
from dteframe.engine import calls
from dteframe.errors import PluginError
from dteframe.records import Group, Question, Questions, Selection, SuccessEstimate

POOL = dict.fromkeys(("a", "b", "c"))
QUESTION = Question("a", "1 + 1", "1 + 1", "2")
RNG = np.random.default_rng(0)


class TwoReferences(SelectorConfig):
    def num_references(self):
        return 2


class Says(Estimator, Selector, Replay, Reward):
    """Gives whatever the test hands it."""

    kind = "selector"

    def __init__(self, given):
        self.config = TwoReferences(type="mine")
        self.given = given

    def start(self, questions, encode_with_policy): ...

    def observe(self, observation): ...

    def references(self, rng):
        return self.given

    def predict(self, policy_version):
        return self.given

    def select(self, estimate, count, rng):
        return Selection(self.given) if isinstance(self.given, tuple) else self.given

    def load(self):
        return self.given

    def offer(self, groups): ...

    def num_ready(self, policy_version):
        return 0

    def draw(self, count, policy_version, excluded, rng):
        return self.given

    def score(self, question, completions):
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given


def estimate(mean, evidence=(1.0, 1.0, 1.0)):
    return SuccessEstimate(("a", "b", "c"), np.array(mean), np.array(evidence))


def group(question_id):
    return Group(question_id, np.arange(2), (), np.zeros(0), 0, 0, "train")


def message_of(call):
    with pytest.raises(PluginError) as caught:
        call()
    where, _, what = str(caught.value).partition(": ")
    assert where.endswith("test_calls.py")
    return what


def test_a_question_selected_twice_is_named():
    ids = ("a", "b", "a")
    assert message_of(lambda: calls.select(Says(ids), estimate([0.5] * 3), 3, RNG)) == (
        "selector 'mine' returned question 'a' twice; select() must give 3 distinct ids"
    )


def test_too_few_selected_questions_are_counted():
    assert message_of(lambda: calls.select(Says(("a",)), estimate([0.5] * 3), 2, RNG)) == (
        "selector 'mine' returned 1 questions; select() must give 2 distinct ids"
    )


def test_an_unknown_reference_is_named():
    assert message_of(lambda: calls.references(Says(("a", "z")), RNG, POOL)) == (
        "selector 'mine' returned the unknown question 'z'; references() must give 2 distinct ids of the pool"
    )


def test_a_prediction_that_is_no_rate_names_its_question():
    for value in (1.5, float("nan")):
        assert message_of(lambda value=value: calls.predict(Says(estimate([0.5, value, 0.5])), 0, POOL)) == (
            f"selector 'mine' predict() gave success rate {value!r} for question 'b'; "
            "success rates lie in [0, 1]"
        )


def test_a_prediction_of_the_wrong_shape_is_measured():
    wrong = SuccessEstimate(("a", "b", "c"), np.zeros((3, 1)), np.zeros(3))
    assert message_of(lambda: calls.predict(Says(wrong), 0, POOL)) == (
        "selector 'mine' predict() gave mean of shape (3, 1) for 3 questions"
    )


def test_negative_evidence_is_refused():
    assert message_of(lambda: calls.predict(Says(estimate([0.5] * 3, (1.0, -1.0, 1.0))), 0, POOL)) == (
        "selector 'mine' predict() gave evidence -1.0 for question 'b'; evidence is 0 or more"
    )


def test_replaying_a_question_that_is_trained_fresh_is_refused():
    assert message_of(lambda: calls.draw(Says([group("a")]), 1, 0, frozenset({"a"}), RNG, POOL)) == (
        "selector 'mine' draw() gave question 'a', which is trained fresh in this step"
    )


def test_drawing_more_than_asked_is_refused():
    assert message_of(lambda: calls.draw(Says([group("a"), group("b")]), 1, 0, frozenset(), RNG, POOL)) == (
        "selector 'mine' draw() gave 2 groups where at most 1 were asked for"
    )


def test_replaying_a_question_that_nobody_knows_is_refused():
    assert message_of(lambda: calls.draw(Says([group("elsewhere")]), 1, 0, frozenset(), RNG, POOL)) == (
        "selector 'mine' draw() gave question 'elsewhere', which is not in the pool"
    )


def test_a_score_that_is_not_finite_names_the_question():
    assert message_of(lambda: calls.score(Says([float("nan")]), QUESTION, [None])) == (
        "selector 'mine' score() gave nan for question 'a'; scores are finite"
    )


def test_a_missing_score_is_counted():
    assert message_of(lambda: calls.score(Says([1.0]), QUESTION, [None, None])) == (
        "selector 'mine' score() gave 1 scores for the 2 completions of question 'a'"
    )


def test_what_a_plugin_raises_passes_with_a_note_that_names_it():
    with pytest.raises(ZeroDivisionError) as caught:
        calls.score(Says(ZeroDivisionError("by zero")), QUESTION, [None])
    (note,) = caught.value.__notes__
    assert note.startswith("while running ") and note.endswith("test_calls.py: selector 'mine'")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: calls.predict(Says(None), 0, POOL), "predict() gave None where a SuccessEstimate is wanted"),
        (
            lambda: calls.predict(Says(SuccessEstimate(("a", "b", "c"), [0.5] * 3, np.ones(3))), 0, POOL),
            "predict() gave a list where a ndarray is wanted",
        ),
        (
            lambda: calls.predict(Says(estimate(["0.5", "0.5", "0.5"])), 0, POOL),
            "predict() gave mean of type <U3; numbers are wanted",
        ),
        (
            lambda: calls.references(Says([["a"], "b"]), RNG, POOL),
            "references() gave the id ['a']; ids are text",
        ),
        (
            lambda: calls.references(Says(["a"]), RNG, POOL),
            "returned 1 questions; references() must give 2 distinct ids",
        ),
        (
            lambda: calls.select(Says(["a"]), estimate([0.5] * 3), 1, RNG),
            "select() gave a list where a Selection is wanted",
        ),
        (
            lambda: calls.draw(Says(["a"]), 1, 0, frozenset(), RNG, POOL),
            "draw() gave a str where a Group is wanted",
        ),
        (lambda: calls.load(Says([QUESTION])), "load() gave a list where a Questions is wanted"),
        (lambda: calls.load(Says(Questions(("a",)))), "load() gave a str where a Question is wanted"),
        (
            lambda: calls.score(Says(SystemExit(3)), QUESTION, [None]),
            "called exit(3); raise an error instead",
        ),
        (
            lambda: calls.score(Says("no"), QUESTION, [None]),
            "score() gave 'no' for question 'a'; one number per completion is wanted, or None where no "
            "answer is found",
        ),
    ],
)
def test_what_is_of_the_wrong_type_is_named(call, what):
    assert message_of(call) == f"selector 'mine' {what}"


def test_a_figure_that_is_no_number_is_named():
    words = SuccessEstimate(("a", "b", "c"), np.full(3, 0.5), np.ones(3), {"slope": "steep"})
    assert message_of(lambda: calls.predict(Says(words), 0, POOL)) == (
        "selector 'mine' predict() gave the figure 'slope' as 'steep'; figures are numbers"
    )
