"""Packing: every group in one minibatch, every row in one micro-batch, fresh and replayed mixed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dteframe.engine.micro_batches import MicroBatch, shared_out, split, split_alike
from dteframe.engine.pack import Minibatch, balanced, pack
from dteframe.records import Completion, CreditedGroup, Group


def credited(
    name: str,
    lengths: tuple[int, ...] = (2, 3),
    rewards: tuple[float, ...] = (1.0, 0.0),
    *,
    prompt_length: int = 4,
    is_replayed: bool = False,
) -> CreditedGroup:
    completions = tuple(
        Completion(np.arange(length), np.full(length, -1.0), "stop", "") for length in lengths
    )
    values = np.array(rewards)
    group = Group(name, np.arange(prompt_length), completions, values, int(values.sum()), 0, "train")
    return CreditedGroup(group, values - values.mean(), is_replayed, staleness=int(is_replayed))


def packed(groups: list[CreditedGroup], num_minibatches: int = 1) -> tuple[Minibatch, ...]:
    return pack(groups, num_minibatches, False, np.random.default_rng(0))


def lengths_of(micro_batches: Sequence[MicroBatch]) -> list[list[int]]:
    return [[row.num_tokens for row in micro_batch.rows] for micro_batch in micro_batches]


def num_fresh(minibatch: Minibatch) -> int:
    return sum(not item.is_replayed for item in minibatch.groups)


def test_equal_rewards_count_in_the_denominators_and_are_not_run() -> None:
    (minibatch,) = packed([credited("a"), credited("b", (5, 6), (1.0, 1.0))])
    assert minibatch.num_rollouts == 4
    assert minibatch.num_tokens == 2 + 3 + 5 + 6
    assert {row.question_id for row in minibatch.rows} == {"a"}


def test_equal_rewards_are_run_where_they_carry_a_gradient() -> None:
    (minibatch,) = pack([credited("b", rewards=(1.0, 1.0))], 1, True, np.random.default_rng(0))
    assert [row.question_id for row in minibatch.rows] == ["b", "b"]


def test_a_minibatch_of_equal_rewards_alone_runs_nothing() -> None:
    (minibatch,) = packed([credited("b", rewards=(0.0, 0.0))])
    assert minibatch.rows == ()
    assert minibatch.num_rollouts == 2


def test_micro_batches_hold_rows_of_similar_length_within_the_budget() -> None:
    # Rows of 4 prompt tokens and 1, 9, 2, 8 completion tokens are 5, 13, 6, 12 long; 26 tokens hold 13 x 2.
    (minibatch,) = packed([credited("a", (1, 9)), credited("b", (2, 8))])
    assert lengths_of(split(minibatch.rows, 26, None)) == [[13, 12], [6, 5]]


def test_a_row_longer_than_the_budget_is_a_micro_batch_of_its_own() -> None:
    (minibatch,) = packed([credited("a", (9, 9))])
    assert lengths_of(split(minibatch.rows, 8, None)) == [[13], [13]]


def test_one_process_gets_the_micro_batches_of_a_split() -> None:
    (minibatch,) = packed([credited("a", (1, 9)), credited("b", (2, 8))])
    assert split_alike(shared_out(minibatch.rows, 1, None), 26, None) == [split(minibatch.rows, 26, None)]


def test_two_processes_get_like_many_tokens_and_equally_many_micro_batches() -> None:
    # Rows of 22, 7, 6, 5 and 5 tokens: 22 stands against 7 + 6 + 5 + 5 = 23.
    (minibatch,) = packed([credited("a", (18, 3, 2, 1, 1), (1.0, 0.0, 0.0, 0.0, 0.0))])
    first, second = split_alike(shared_out(minibatch.rows, 2, None), 14, None)
    assert lengths_of(first) == [[22], []]
    assert lengths_of(second) == [[7, 6], [5, 5]]


def test_a_process_without_rows_gets_empty_micro_batches() -> None:
    (minibatch,) = packed([credited("a", (1, 1))])
    shares = split_alike(shared_out(minibatch.rows, 3, None), 5, None)
    assert [lengths_of(share) for share in shares] == [[[5]], [[5]], [[]]]
    assert split_alike(shared_out((), 2, None), 5, None) == [(), ()]


def test_there_are_never_more_minibatches_than_groups() -> None:
    assert len(packed([credited("a")], num_minibatches=2)) == 1
    assert packed([], num_minibatches=2) == ()


def test_a_broken_log_prob_names_the_question_and_the_rollout() -> None:
    good = credited("q-17")
    broken = Completion(np.arange(2), np.array([-1.0, -np.inf]), "stop", "")
    group = Group(
        "q-17", np.arange(4), (good.group.completions[0], broken), good.group.rewards, 1, 0, "train"
    )
    message = (
        "question 'q-17': rollout 1 has advantage -0.5 and a lowest behaviour log-prob of -inf nats; "
        "both must be finite"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packed([CreditedGroup(group, good.advantages, False, 0)])


def test_the_generator_alone_decides_who_meets_whom() -> None:
    groups = [credited(str(number)) for number in range(12)]

    def names(seed: int) -> list[list[str]]:
        minibatches = pack(groups, 3, False, np.random.default_rng(seed))
        return [[item.group.question_id for item in minibatch.groups] for minibatch in minibatches]

    assert names(1) == names(1)
    assert names(1) != names(2)


@given(
    fresh=st.integers(0, 20),
    replayed=st.integers(0, 20),
    num_equal=st.integers(0, 20),
    num_minibatches=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_every_minibatch_has_the_batchs_make_up_within_one_group(
    fresh: int, replayed: int, num_equal: int, num_minibatches: int, seed: int
) -> None:
    groups = [
        credited(f"f{number}", rewards=(1.0, 1.0) if number < num_equal else (1.0, 0.0))
        for number in range(fresh)
    ]
    groups += [credited(f"r{number}", is_replayed=True) for number in range(replayed)]
    if len(groups) < num_minibatches:
        return
    minibatches = pack(groups, num_minibatches, False, np.random.default_rng(seed))

    dealt = Counter(item.group.question_id for minibatch in minibatches for item in minibatch.groups)
    assert dealt == Counter(item.group.question_id for item in groups)
    sizes = [len(minibatch.groups) for minibatch in minibatches]
    assert max(sizes) - min(sizes) <= 1
    for minibatch in minibatches:
        assert abs(num_fresh(minibatch) - fresh / len(groups) * len(minibatch.groups)) <= 1
    running = [len({row.question_id for row in item.rows}) for item in minibatches]
    assert max(running) - min(running) <= 2


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), tokens=st.integers(1, 200))
def test_every_row_is_in_one_micro_batch_and_padding_counts(lengths: list[int], tokens: int) -> None:
    (minibatch,) = packed([credited("a", tuple(lengths), (1.0,) + (0.0,) * (len(lengths) - 1))])
    if len(lengths) == 1:
        assert minibatch.rows == ()
        return
    parts = split(minibatch.rows, tokens, None)
    assert sorted(row.index for part in parts for row in part.rows) == list(range(len(lengths)))
    for part in parts:
        assert len(part.rows) == 1 or math.prod(part.shape) <= tokens


@given(sizes=st.lists(st.integers(1, 1000), max_size=30), num_shares=st.integers(1, 8))
def test_shares_hold_every_item_once_and_differ_by_no_more_than_the_largest(
    sizes: list[int], num_shares: int
) -> None:
    shares = balanced(sizes, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes, default=0)
