"""Near duplicates: what counts as one, and that groups are found among many texts."""

from __future__ import annotations

from dteframe.experiments.near_duplicates import near_duplicate_groups, shingles_of

FIRST = "Find the number of positive integers $n$ such that $n^2 + 3n + 2$ is divisible by 7 and $n < 100$."
REWRITTEN = (
    r"Find the number of positive integers \(n\) such that \left(n^2+3n+2\right) is divisible by 7 "
    "and n < 100"
)
OTHER_NUMBER = FIRST.replace("100", "200")
DIFFERENT = "A train leaves the station at noon with 40 passengers. At each stop half of them get off."


def test_spelling_and_one_other_number_do_not_make_another_question():
    assert near_duplicate_groups([FIRST, DIFFERENT, REWRITTEN, OTHER_NUMBER]).tolist() == [0, 1, 0, 0]


def test_questions_that_share_a_beginning_alone_are_different():
    begin = "Find the number of positive integers $n$ such that "
    ends = "$n$ is prime and $n + 2$ is not.", "the digits of $3^n$ add up to a multiple of eleven."
    assert near_duplicate_groups([begin + end for end in ends]).tolist() == [0, 1]


def test_the_order_of_texts_changes_the_numbers_alone():
    texts = [FIRST, DIFFERENT, REWRITTEN, "short", "", "Short!"]
    assert near_duplicate_groups(texts).tolist() == [0, 1, 0, 2, 3, 2]
    assert near_duplicate_groups(texts[::-1]).tolist() == [0, 1, 0, 2, 3, 2]


def test_shingles_by_hand():
    assert [value.to_bytes(6, "big") for value in shingles_of("a-B c/1D2!").tolist()] == [b"abc1d2"]
    assert len(shingles_of("abababababab")) == 2
