"""What every dataset promises."""

from __future__ import annotations

import json
from collections import Counter

from dteframe.contracts import Dataset
from dteframe.records import Questions
from dteframe.testing.promises.every_kind import state_comes_back
from dteframe.testing.subject import Subject, insist, same_value


def loads_questions_with_text_and_prompt(subject: Subject) -> None:
    """``load`` gives at least one training question; each has an id, a text and something to ask."""
    questions = _loaded(subject)
    insist(bool(questions.train), "no training question; raise DataError when the source is empty")
    for question in (*questions.train, *questions.evaluation):
        complete = bool(question.id and question.text.strip() and question.prompt)
        insist(complete, f"question {question.id!r} has no id, no text or no prompt")
        if not isinstance(question.prompt, str):
            wrong = [message for message in question.prompt if not {"role", "content"} <= message.keys()]
            insist(not wrong, f"question {question.id!r}: the message {wrong[:1]} lacks role or content")


def ids_are_distinct(subject: Subject) -> None:
    """An id names one question of the run, over training and evaluation questions together."""
    questions = _loaded(subject)
    counted = Counter(question.id for question in (*questions.train, *questions.evaluation))
    repeated = [name for name, number in counted.items() if number > 1]
    insist(not repeated, f"ids {repeated[:3]} are given to more than one question")


def loading_again_gives_the_same_questions(subject: Subject) -> None:
    """Equal configurations load equal questions in the same order, in every process."""
    first, second = _loaded(subject), _loaded(subject)
    insist(first.train == second.train, "the training questions differ from load to load")
    insist(first.evaluation == second.evaluation, "the evaluation questions differ from load to load")
    insist(same_value(first.left_out, second.left_out), f"left out {first.left_out}, then {second.left_out}")


def evaluation_texts_are_not_trained_on(subject: Subject) -> None:
    """No evaluation question has the text of a training question, up to white space."""
    questions = _loaded(subject)
    trained = {question.text_hash for question in questions.train}
    leaked = [question.id for question in questions.evaluation if question.text_hash in trained]
    insist(not leaked, f"evaluation questions {leaked[:3]} are trained on too")


def columns_are_json_values(subject: Subject) -> None:
    """``columns`` travel to other processes and into files: JSON values only."""
    questions = _loaded(subject)
    for question in (*questions.train, *questions.evaluation):
        columns = dict(question.columns)
        try:
            read = json.loads(json.dumps(columns))
        except (TypeError, ValueError) as error:
            insist(False, f"question {question.id!r}: {error}")
        else:
            insist(
                read.keys() == columns.keys(), f"question {question.id!r}: keys {list(columns)} are no texts"
            )


def announced_number_holds(subject: Subject) -> None:
    """``config.num_questions()`` is None, or counts the training questions: no fewer than are loaded."""
    announced = subject.config().num_questions()
    if announced is not None:
        questions = _loaded(subject)
        present = len(questions.train)
        explained = present + len(questions.evaluation) + sum(questions.left_out.values())
        insist(present <= announced <= explained, f"{announced} questions announced, {present} loaded")


def _loaded(subject: Subject) -> Questions:
    dataset: Dataset = subject.make()
    return dataset.load()


PROMISES = (
    state_comes_back,
    loads_questions_with_text_and_prompt,
    ids_are_distinct,
    loading_again_gives_the_same_questions,
    evaluation_texts_are_not_trained_on,
    columns_are_json_values,
    announced_number_holds,
)
