"""What every reward promises."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dteframe.contracts import Reward
from dteframe.records import Completion, Question
from dteframe.testing.promises.every_kind import state_comes_back
from dteframe.testing.subject import Subject, completion_of, insist


def one_finite_score_per_completion(subject: Subject) -> None:
    """``score`` gives a finite number per completion, or None for no answer: also to an empty text."""
    for question in _questions(subject):
        completions = _completions(question)
        for given in (completions, completions[:1], completions[-1:]):
            scores = list(_started(subject).score(question, given))
            insist(len(scores) == len(given), f"{len(scores)} scores for {len(given)} completions")
            wrong = [score for score in scores if score is not None and not math.isfinite(score)]
            insist(not wrong, f"question {question.id!r}: score {wrong[:1]} is not finite")


def scores_follow_the_order_of_the_completions(subject: Subject) -> None:
    """The first score is the first completion's: completions backwards give scores backwards."""
    for question in _questions(subject):
        completions = _completions(question)
        forwards = list(_started(subject).score(question, completions))
        backwards = list(_started(subject).score(question, completions[::-1]))
        insist(forwards == backwards[::-1], f"question {question.id!r}: {forwards}, backwards {backwards}")


def scoring_again_gives_the_same_scores(subject: Subject) -> None:
    """``score`` depends on nothing but question and completions: it may run again, in another process."""
    reward = _started(subject)
    for question in _questions(subject):
        first = list(reward.score(question, _completions(question)))
        again = list(reward.score(question, _completions(question)))
        elsewhere = list(_started(subject).score(question, _completions(question)))
        insist(
            first == again == elsewhere, f"question {question.id!r}: {first}, then {again}, then {elsewhere}"
        )


def problem_is_a_sentence_or_none(subject: Subject) -> None:
    """``problem_with`` says in words why a question cannot be scored, or gives None, and never raises."""
    odd = Question(id="odd", text="?", prompt="?", answer="")
    for question in (*subject.questions, odd):
        problem = subject.make().problem_with(question)
        is_sentence = problem is None or (isinstance(problem, str) and bool(problem.strip()))
        insist(is_sentence, f"question {question.id!r}: problem_with gives {problem!r}")


def some_question_can_be_scored(subject: Subject) -> None:
    """``problem_with`` leaves some questions; pass suitable ones to ``check_component(questions=...)``."""
    problems = {subject.make().problem_with(question) for question in subject.questions}
    insist(None in problems, f"no question is left to score: {'; '.join(map(str, problems))}"[:200])


def _started(subject: Subject) -> Reward:
    reward: Reward = subject.make()
    reward.start()
    return reward


def _questions(subject: Subject) -> list[Question]:
    reward: Reward = subject.make()
    return [question for question in subject.questions if reward.problem_with(question) is None][:6]


def _completions(question: Question) -> Sequence[Completion]:
    texts = (question.answer, f"The answer is \\boxed{{{question.answer}}}.", "I don't know", "7" * 40, "")
    return [completion_of(text) for text in texts]


PROMISES = (
    state_comes_back,
    one_finite_score_per_completion,
    scores_follow_the_order_of_the_completions,
    scoring_again_gives_the_same_scores,
    problem_is_a_sentence_or_none,
    some_question_can_be_scored,
)
