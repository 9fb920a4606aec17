import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dteframe import Context
from dteframe.datasets.list_operations import OPERATIONS, ListOperations, ListOperationsConfig, work_out


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path, "cpu", 0, lambda what, done, total: None, lambda message: None)


def test_every_operation_does_what_its_name_says():
    expected = {
        "reverse": (9, 1, 4, 3),
        "rotate_left": (4, 1, 9, 3),
        "rotate_right": (9, 3, 4, 1),
        "increment": (4, 5, 2, 0),
        "decrement": (2, 3, 0, 8),
        "double": (6, 8, 2, 8),
        "swap_ends": (9, 4, 1, 3),
        "sort": (1, 3, 4, 9),
    }
    assert {name: operation.apply((3, 4, 1, 9)) for name, operation in OPERATIONS.items()} == expected


def test_symbols_differ_and_are_neither_digits_nor_the_colon():
    symbols = [operation.symbol for operation in OPERATIONS.values()]
    assert len(set(symbols)) == len(symbols)
    assert not set(symbols) & set("0123456789: ")


def test_a_worked_solution_shows_every_list_and_ends_in_the_answer():
    chain = ("reverse", "increment", "rotate_left")
    assert work_out((3, 1, 4, 2), chain) == ("r2413+3524<5243:5243", "5243")


def test_a_question_is_the_chain_and_the_list(context):
    config = ListOperationsConfig(size=1, chain_lengths=[1], list_length=2, operations=["reverse"])
    (question,) = ListOperations(config, context).load().train
    assert re.fullmatch(r"r:\d\d", question.text)
    assert question.prompt == question.text
    assert question.answer == question.text[:1:-1]
    assert question.solution == f"r{question.answer}:{question.answer}"
    assert question.columns == {"chain_length": 1, "operations": ["reverse"]}
    assert question.id == "chain1-00000"


@given(
    st.integers(1, 200),
    st.sets(st.integers(1, 20), min_size=1),
    st.integers(2, 8),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 8)),
    st.booleans(),
)
def test_questions_are_distinct_short_and_right(
    size, chain_lengths, list_length, seed, longest_solution, repeats
):
    if not repeats:
        chain_lengths = {(length - 1) % len(OPERATIONS) + 1 for length in chain_lengths}
    config = ListOperationsConfig(
        size=size,
        chain_lengths=sorted(chain_lengths),
        list_length=list_length,
        operations=list(OPERATIONS),
        longest_solution=longest_solution,
        repeats=repeats,
        seed=seed,
    )
    nowhere = Context(Path("."), Path("."), "cpu", 0, lambda what, done, total: None, lambda message: None)
    questions = ListOperations(config, nowhere).load().train
    assert len(questions) == config.num_questions() == size
    assert len({question.text_hash for question in questions}) == size
    assert len({question.id for question in questions}) == size
    by_symbol = {operation.symbol: operation for operation in OPERATIONS.values()}
    for question in questions:
        chain, digits = question.text.split(":")
        for symbol in chain:
            digits = "".join(map(str, by_symbol[symbol].apply(tuple(map(int, digits)))))
        assert question.answer == digits and len(digits) == list_length
        assert len(chain) == question.columns["chain_length"] <= max(chain_lengths)
        assert repeats or len(chain) == len(set(chain))
        assert len(question.text) < 32
        has_solution = longest_solution is None or len(chain) <= longest_solution
        assert (question.solution is not None) == has_solution
        if question.solution is not None:
            assert len(question.solution) < 200
            assert re.search(r":(\d+)$", question.solution).group(1) == question.answer


def test_shares_follow_the_weights_and_add_up_to_the_size():
    config = ListOperationsConfig(size=11, chain_lengths=[1, 2, 3], chain_length_weights=[1, 1, 2])
    assert config.num_questions_by_chain_length() == {1: 3, 2: 3, 3: 5}


def test_another_chain_length_leaves_the_other_questions_as_they_are(context):
    def texts(lengths, size):
        config = ListOperationsConfig(size=size, chain_lengths=lengths)
        return {question.text for question in ListOperations(config, context).load().train}

    assert texts([1, 2], 40) < texts([1, 2, 3], 60)


def test_chains_with_repeats_may_be_longer_than_there_are_operations(context):
    lengths = [3, 20]
    config = ListOperationsConfig(
        size=100, chain_lengths=lengths, operations=["sort", "reverse"], repeats=True
    )
    questions = ListOperations(config, context).load().train
    assert {len(question.columns["operations"]) for question in questions} == set(lengths)


def test_of_more_questions_than_random_sample_takes_distinct_ones_are_drawn_the_same_each_time(context):
    config = ListOperationsConfig(size=10, chain_lengths=[20], list_length=8, repeats=True)
    assert config.num_possible(20) > sys.maxsize
    texts = [question.text for question in ListOperations(config, context).load().train]
    assert len(set(texts)) == 10
    assert texts == [question.text for question in ListOperations(config, context).load().train]


def test_the_seed_decides_the_questions(context):
    def load(seed):
        return ListOperations(ListOperationsConfig(size=50, seed=seed), context).load()

    assert load(0) == load(0)
    assert load(0) != load(1)


def test_every_question_that_exists_can_be_asked_for(context):
    config = ListOperationsConfig(size=200, chain_lengths=[1], list_length=2, operations=["sort", "reverse"])
    texts = {question.text for question in ListOperations(config, context).load().train}
    assert texts == {f"{symbol}:{number:02d}" for symbol in "sr" for number in range(100)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": 101, "chain_lengths": [1], "list_length": 2, "operations": ["sort"]},
            "size: 101 questions of chain length 1 are wanted but only 100 differ; lower size, give "
            "longer lists, longer chains or more operations, or set repeats: true",
        ),
        ({"chain_lengths": [2, 2]}, "chain_lengths: 2 is listed twice; list it once"),
        ({"operations": ["sort", "sort"]}, "operations: 'sort' is listed twice; list it once"),
        (
            {"chain_lengths": [1, 3], "operations": ["sort", "reverse"]},
            "chain_lengths: 3 different operations are wanted but operations lists 2; shorten the "
            "chains, list more, or set repeats: true",
        ),
        (
            {"chain_lengths": [1, 2], "chain_length_weights": [1]},
            "chain_length_weights: 1 weights for 2 chain_lengths; give one weight per length",
        ),
    ],
)
def test_impossible_options_are_refused_with_a_reason(options, message):
    with pytest.raises(ValidationError) as caught:
        ListOperationsConfig(**options)
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"
