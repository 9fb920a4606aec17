import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dteframe import Completion, Context, Question
from dteframe.datasets.reasoning_gym import ReasoningGym, ReasoningGymConfig, TaskConfig
from dteframe.rewards.exact_match import ExactMatch, ExactMatchConfig
from dteframe.rewards.format import Format, FormatConfig
from dteframe.rewards.math_verify import MathVerify, MathVerifyConfig, last_box
from dteframe.rewards.reasoning_gym import ReasoningGymReward, ReasoningGymRewardConfig


def completions(*texts: str) -> list[Completion]:
    return [Completion(np.array([1]), np.array([0.0]), "stop", text) for text in texts]


def question(answer: str) -> Question:
    return Question("q-17", "What?", "What?", answer)


class Told(list[str]):
    """The warnings that a component gave, with the context that collects them."""

    def context(self) -> Context:
        return Context(Path("."), Path("."), "cpu", 0, lambda what, done, total: None, self.append)


@pytest.fixture
def told() -> Told:
    return Told()


# exact_match


def test_without_a_pattern_the_whole_completion_is_the_answer(told):
    reward = ExactMatch(ExactMatchConfig(), told.context())
    assert reward.score(question("5243"), completions("5243", " 5243\n", "x5243", "")) == [1, 1, 0, 0]


def test_the_last_match_of_the_pattern_is_the_answer(told):
    reward = ExactMatch(ExactMatchConfig(answer_pattern=r":(\d+)$"), told.context())
    texts = completions("r2413+3524:3524", ":3524:3525", "3524", "r2413:3524 ")
    assert reward.score(question("3524"), texts) == [1, 0, None, None]
    reward = ExactMatch(ExactMatchConfig(answer_pattern=r"(\d+)"), told.context())
    assert reward.score(question("7"), completions("not 6 but 7", "7, or 8", "none")) == [1, 0, None]


def test_case_and_whitespace_count_unless_told_otherwise(told):
    texts = completions("Par is", "paris", " Paris")
    answer = question("Paris")
    assert ExactMatch(ExactMatchConfig(), told.context()).score(answer, texts) == [0, 0, 1]
    config = ExactMatchConfig(ignore_case=True, ignore_whitespace="all")
    assert ExactMatch(config, told.context()).score(answer, texts) == [1, 1, 1]
    config = ExactMatchConfig(ignore_whitespace="none")
    assert ExactMatch(config, told.context()).score(answer, texts) == [0, 0, 0]


def test_a_match_of_nothing_behind_the_text_is_no_answer(told):
    reward = ExactMatch(ExactMatchConfig(answer_pattern="(.*)$"), told.context())
    assert reward.score(question("7"), completions("7", "so\n7", "")) == [1, 1, None]


def test_a_group_that_took_no_part_in_the_match_is_no_answer(told):
    reward = ExactMatch(ExactMatchConfig(answer_pattern=r"(?:yes|(no))"), told.context())
    assert reward.score(question("no"), completions("no", "yes")) == [1, None]


def test_an_empty_gold_answer_is_a_problem(told):
    reward = ExactMatch(ExactMatchConfig(), told.context())
    assert reward.problem_with(question(" ")) == "its answer ' ' is empty"
    assert reward.problem_with(question("0")) is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "'(' is no regular expression: missing ), unterminated subpattern at position 0"),
        (r"\d", r"'\\d' has 0 groups; put one ( ) around the answer, others as (?: )"),
        ("(a)(b)", "'(a)(b)' has 2 groups; put one ( ) around the answer, others as (?: )"),
    ],
)
@pytest.mark.parametrize("config", [ExactMatchConfig, ReasoningGymRewardConfig])
def test_a_pattern_without_exactly_one_group_is_refused(config, pattern, message):
    with pytest.raises(ValidationError) as caught:
        config(answer_pattern=pattern)
    (error,) = caught.value.errors()
    assert error["loc"] == ("answer_pattern",)
    assert error["msg"] == f"Value error, {message}"


# format


def test_format_asks_for_a_match_anywhere_or_of_everything(told):
    texts = completions("<think>a\nb</think>4", "<think>4", "so <think></think>4")
    pattern = "<think>.*</think>.+"
    assert Format(FormatConfig(pattern=pattern), told.context()).score(question("4"), texts) == [1, 0, 1]
    config = FormatConfig(pattern=pattern, full_match=True)
    assert Format(config, told.context()).score(question("4"), texts) == [1, 0, 0]


def test_format_refuses_what_is_no_pattern():
    with pytest.raises(ValidationError, match=r"'\[' is no regular expression: unterminated character set"):
        FormatConfig(pattern="[")


# math_verify


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        (r"\frac{1}{2}", r"so it is \boxed{0.5}", 1),
        (r"\frac{1}{2}", r"so it is $\boxed{\frac{2}{4}}$.", 1),
        ("72", r"first \boxed{71}, no: \boxed{72}", 1),
        ("71", r"first \boxed{71}, no: \boxed{72}", 0),
        ("72", "The answer is 72.", 1),
        ("72", "The answer is 71.", 0),
        ("72", "The answer is **72**.", 1),
        ("72", "**Answer:** `72`", 1),
        ("72", "So it is ***71***!", 0),
        (r"\boxed{x^2+1}", r"\boxed{1+x^2}", 1),
        ("$x+1$", r"\boxed{1+x}", 1),
        ("1,234", r"\boxed{1234}", 1),
        ("(1,2)", r"\boxed{(1, 2)}", 1),
        ("(1,2)", r"\boxed{(2, 1)}", 0),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
        ("1000", "It is 1000!", 1),
        ("1000", "So the answer is **1000**!!", 1),
        ("1000", "It is 1000! Easy.", 1),
        ("1000", "It is 999!", 0),
        ("120", "5! = 120", 1),
        ("120", r"\boxed{5!}", 1),
        ("12", "", None),
        ("12", "no idea", None),
        ("12", r"\boxed{}", None),
        ("12", r"\boxed{12", None),
    ],
)
def test_answers_are_compared_as_mathematics(told, gold, text, score):
    assert MathVerify(MathVerifyConfig(), told.context()).score(question(gold), completions(text)) == [score]
    assert told == []


def test_with_require_box_an_answer_in_the_open_is_wrong(told):
    reward = MathVerify(MathVerifyConfig(require_box=True), told.context())
    assert reward.score(question("72"), completions("It is 72.", r"\boxed{72}")) == [None, 1]


def test_the_last_closed_box_is_found_through_nested_braces():
    assert last_box(r"\boxed{1} and \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert last_box(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_box(r"\fbox {7} \boxed{8") == "7"
    assert last_box(r"{ \boxed{7} } \boxed{8") == "7"
    assert last_box(r"\boxed{\frac{1}{2}") is None
    assert last_box("no box") is None


def test_a_completion_of_open_boxes_alone_is_searched_in_one_pass():
    begin = time.process_time()
    assert last_box(r"\boxed{" * 20_000) is None
    assert time.process_time() - begin < 1.0


def test_gold_answers_that_cannot_be_scored_are_problems(told):
    reward = MathVerify(MathVerifyConfig(max_answer_length=20), told.context())
    assert reward.problem_with(question(r"\frac{3}{4}")) is None
    assert reward.problem_with(question("???")) == "its answer '???' does not parse as mathematics"
    assert reward.problem_with(question("9^{9^9}")) == "its answer '9^{9^9}' has a power of a power"
    assert reward.problem_with(question("1" * 21)) == (
        f"its answer '{'1' * 21}' has more than 20 characters (max_answer_length)"
    )


MONSTERS = [
    r"9^{9^{9}}",
    "9^9^9",
    "2**2**2**99",
    "2^{99999999}",
    "(x+1)^{200}",
    "x^{100000}",
    "99999!",
    "(9!)!",
    r"\int_0^1 e^{-x^2} dx",
    r"\sum_{i=1}^{10000000} i",
    r"\binom{100000}{50000}",
    "7" * 5000,
]


@pytest.mark.parametrize("monster", MONSTERS)
def test_monsters_are_refused_before_anything_is_computed(told, monster):
    reward = MathVerify(MathVerifyConfig(), told.context())
    assert reward.score(question("5"), completions(f"\\boxed{{{monster}}}")) == [None]
    assert len(told) == 1 and told[0].endswith(" are refused; they count as not found")


def test_refusals_are_told_in_the_same_words(told):
    reward = MathVerify(MathVerifyConfig(), told.context())
    for monster in ("9^9^9", "8^8^8"):
        reward.score(question("5"), completions(f"\\boxed{{{monster}}}"))
    sentence = "math_verify: answers with a power of a power are refused; they count as not found"
    assert told == [sentence, sentence]


def test_math_verify_works_in_a_thread(told):
    reward = MathVerify(MathVerifyConfig(), told.context())
    scores: list[list[float]] = []
    thread = threading.Thread(
        target=lambda: scores.append(reward.score(question("2"), completions(r"\boxed{2}")))
    )
    thread.start()
    thread.join()
    assert scores == [[1.0]]


# reasoning_gym


def gym_questions(told: Told, **task) -> tuple[Question, ...]:
    config = ReasoningGymConfig(tasks=[TaskConfig(**task)], size=4)
    return ReasoningGym(config, told.context()).load().train


def test_the_task_scores_the_answer_and_partial_credit_is_no_success(told):
    for asked in gym_questions(told, name="spell_backward"):
        texts = completions(asked.answer, asked.answer[:-1] + "#", f"the word {asked.answer}")
        assert ReasoningGymReward(ReasoningGymRewardConfig(), told.context()).score(asked, texts) == [1, 0, 0]
        partial = ReasoningGymReward(ReasoningGymRewardConfig(threshold=None), told.context()).score(
            asked, texts
        )
        assert partial[0] == 1 and 0 < partial[1] < 1


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "gsm_symbolic", "countdown", "knights_knaves"])
def test_entries_survive_json(told, name):
    reward = ReasoningGymReward(ReasoningGymRewardConfig(), told.context())
    for asked in gym_questions(told, name=name):
        columns = json.loads(json.dumps(asked.columns))
        copy = Question(asked.id, asked.text, asked.prompt, asked.answer, None, columns)
        assert reward.problem_with(copy) is None
        answer = asked.answer or columns["entry"]["metadata"].get("possible_answer", "")
        assert reward.score(copy, completions(answer, "no idea")) == reward.score(
            asked, completions(answer, "no idea")
        )
        assert reward.score(copy, completions(asked.answer)) == [1]


def test_the_answer_pattern_takes_the_answer_out_of_the_completion(told):
    (asked, *_) = gym_questions(told, name="chain_sum")
    config = ReasoningGymRewardConfig(answer_pattern="<answer>(.*?)</answer>")
    texts = completions(f"it is <answer> {asked.answer} </answer>", asked.answer)
    assert ReasoningGymReward(config, told.context()).score(asked, texts) == [1, None]


def test_a_task_that_fails_on_an_answer_gives_0_and_is_told_of(told):
    (asked, *_) = gym_questions(told, name="prime_factorization")
    reward = ReasoningGymReward(ReasoningGymRewardConfig(), told.context())
    assert reward.score(asked, completions(asked.answer, "two × three", "a × b")) == [1, 0, 0]
    sentence = (
        "reasoning_gym task 'prime_factorization' fails on some answers, with ValueError; they count as wrong"
    )
    assert told == [sentence, sentence]


def test_questions_from_elsewhere_are_a_problem(told):
    reward = ReasoningGymReward(ReasoningGymRewardConfig(), told.context())
    problem = "it lacks the columns task, options, entry that dataset type 'reasoning_gym' gives"
    assert reward.problem_with(question("4")) == problem
    with pytest.raises(ValueError, match="question 'q-17': " + problem):
        reward.score(question("4"), completions("4"))


# all of them


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(), st.from_regex(r"\\boxed\{[-+*/^()0-9a-z\\{}]{0,12}\}")), min_size=1, max_size=4
    )
)
def test_any_text_gets_a_finite_score_or_none_and_the_same_one_again(texts):
    context = Told().context()
    asked = {
        "plain": question("12"),
        "gym": ReasoningGym(ReasoningGymConfig.example(Path(".")), context).load().train[0],
    }
    rewards = [
        (ExactMatch(ExactMatchConfig(answer_pattern=r"(\d*)"), context), "plain"),
        (Format(FormatConfig(pattern=r"\d"), context), "plain"),
        (MathVerify(MathVerifyConfig(), context), "plain"),
        (ReasoningGymReward(ReasoningGymRewardConfig(), context), "gym"),
    ]
    for reward, kind in rewards:
        scores = reward.score(asked[kind], completions(*texts))
        assert len(scores) == len(texts)
        found = [score for score in scores if score is not None]
        assert all(isinstance(score, float) and math.isfinite(score) and 0 <= score <= 1 for score in found)
        assert reward.score(asked[kind], completions(*texts)) == scores


@pytest.mark.parametrize(
    "config", [ExactMatchConfig, FormatConfig, MathVerifyConfig, ReasoningGymRewardConfig]
)
def test_every_example_is_a_configuration_that_survives_json(config, tmp_path):
    example = config.example(tmp_path)
    assert config.model_validate_json(example.model_dump_json()) == example
