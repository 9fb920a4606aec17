import re

import numpy as np
import pytest

from dteframe.contracts import Reward, RewardConfig
from dteframe.engine.pool import Pool, encode_prompts, make_pool
from dteframe.errors import DataError
from dteframe.models.characters import character_tokenizer
from dteframe.records import Question, Questions
from dteframe.testing.tiny import tiny_policy


def question(name, text=None, answer="1", prompt=None):
    text = text if text is not None else f"what is {name}"
    return Question(name, text, prompt if prompt is not None else text, answer)


class NeedsDigits(Reward):
    config: RewardConfig

    def score(self, question, completions):
        return [0.0 for _ in completions]

    def problem_with(self, question):
        return None if question.answer.isdigit() else f"answer {question.answer!r} is no number"


@pytest.fixture
def reward():
    return NeedsDigits(RewardConfig(type="needs_digits"), None)


@pytest.fixture
def warnings():
    return []


def pool_of(questions, warnings, *, size=0, rewards=(), evaluation=()):
    rng = np.random.default_rng(0)
    return make_pool(Questions(tuple(questions), tuple(evaluation)), rewards, size, rng, warnings.append)


def test_questions_of_equal_text_up_to_spaces_count_once(warnings):
    pool = pool_of([question("a", "1 + 1"), question("b", "1  +\n1"), question("c", "2 + 2")], warnings)
    assert list(pool.train) == ["a", "c"]
    assert pool.left_out == {"same text as another question": 1}


def test_held_out_questions_are_never_trained_on(warnings):
    pool = pool_of([question(str(n)) for n in range(20)], warnings, size=5)
    assert len(pool.train) == 15 and len(pool.evaluation) == 5
    assert not set(pool.train) & set(pool.evaluation)


def test_training_questions_with_a_held_out_text_are_left_out_and_counted(warnings):
    train = [question("a", "1 + 1"), question("b", "2 + 2")]
    pool = pool_of(train, warnings, size=1, evaluation=[question("x", "1 +  1")])
    assert list(pool.train) == ["b"] and list(pool.evaluation) == ["x"]
    assert pool.left_out == {"training question with the text of a held-out one": 1}


def test_answers_that_the_reward_cannot_score_are_counted_and_named(warnings, reward):
    train = [question("a"), question("b", answer="x"), question("c", answer="")]
    pool = pool_of(train, warnings, rewards=[reward])
    assert list(pool.train) == ["a"]
    assert pool.left_out == {"answer that the reward cannot score": 2}
    assert re.fullmatch(
        r".*test_pool\.py: reward 'needs_digits' cannot score 2 questions, which are left out: "
        r"'b' \(answer 'x' is no number\), 'c' \(answer '' is no number\)",
        warnings[0],
    )


def test_repeated_ids_are_refused(warnings):
    with pytest.raises(DataError, match="question id 'a' stands 2 times; ids must be distinct"):
        pool_of([question("a"), question("a", "other")], warnings)


def test_holding_out_everything_is_refused(warnings):
    with pytest.raises(
        DataError, match="training.evaluation_size: 2 questions are to be held out of 2 usable ones"
    ):
        pool_of([question("a"), question("b")], warnings, size=2)


def test_prompts_that_are_too_long_are_left_out_and_never_cut(warnings):
    pool = pool_of([question("short", "1 + 1"), question("long", "1 + " * 20)], warnings)
    kept, prompts = encode_prompts(pool, tiny_policy().tokenizer, 10, warnings.append)
    assert list(kept.train) == ["short"] and list(prompts) == ["short"]
    assert kept.left_out["prompt longer than max_prompt_length"] == 1
    assert warnings == [
        "1 of 2 prompts are longer than training.max_prompt_length (10 tokens) and are left out; "
        "the longest is 'long' with 80 tokens"
    ]


def test_a_pool_of_long_prompts_alone_is_refused(warnings):
    pool = pool_of([question("long", "1 + " * 20)], warnings)
    with pytest.raises(
        DataError, match=r"every prompt is longer than training.max_prompt_length \(10 tokens\)"
    ):
        encode_prompts(pool, tiny_policy().tokenizer, 10, warnings.append)


def test_characters_that_the_policy_does_not_know_are_told_of_once_for_all(warnings):
    pool = Pool(
        {"a": question("a", "1+1"), "b": question("b", "1*=1")},
        {"c": question("c", "1+11", answer="9"), "d": question("d", "1:1", answer="11")},
        {},
    )
    encode_prompts(pool, character_tokenizer(["1+1"], ""), 10, warnings.append)
    assert warnings == [
        "2 prompts have characters that the policy's tokenizer does not know, first that of 'b': '*='",
        "1 held-out answers have characters that the policy's tokenizer does not know, "
        "first that of 'c': '9'",
    ]


def test_unknown_characters_of_a_chat_template_are_named(warnings):
    tokenizer = character_tokenizer(["1+1"], "")
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    chat = question("a", prompt=({"role": "user", "content": "1+1"},))
    _, prompts = encode_prompts(Pool({"a": chat}, {}, {}), tokenizer, 10, warnings.append)
    assert len(prompts["a"].token_ids) == 5
    assert warnings == [
        "1 prompts have characters that the policy's tokenizer does not know, first that of 'a': '<>'"
    ]


def test_an_empty_prompt_is_refused_by_name(warnings):
    pool = pool_of([question("a", prompt="")], warnings)
    with pytest.raises(DataError, match="question 'a': its prompt has no tokens; leave it out of the data"):
        encode_prompts(pool, tiny_policy().tokenizer, 10, warnings.append)


def test_a_dataset_that_no_reward_can_score_is_refused_with_the_counts(warnings, reward):
    with pytest.raises(DataError) as caught:
        pool_of([question("a", answer="x"), question("b", answer="y")], warnings, rewards=[reward])
    assert str(caught.value) == (
        "dataset: no question to train on is left of 2; mend what is "
        "left out: 2 x answer that the reward cannot score"
    )


def test_text_that_cannot_be_written_is_left_out_and_counted(warnings):
    pool = pool_of([question("a"), question("b", "half a character: \ud800")], warnings)
    assert list(pool.train) == ["a"] and pool.left_out == {"text that is not valid Unicode": 1}
