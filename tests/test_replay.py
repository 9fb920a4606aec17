"""The fifo buffer: what enters, what leaves, what is drawn, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dteframe import BatchArithmetic, Completion, Context, Group
from dteframe.replay.fifo import FifoConfig, FifoReplay
from dteframe.replay.none import NoneConfig, NoneReplay

CONTEXT = Context(Path("unused"), Path("unused"), "cpu", 0, lambda *_: None, lambda _: None)
NOBODY: frozenset[str] = frozenset()


def group_of(name: str, successes: int = 1, version: int = 0, trials: int = 4) -> Group:
    rng = np.random.default_rng([*name.encode(), version, successes])
    lengths = rng.integers(1, 5, trials)
    completions = tuple(
        Completion(
            rng.integers(0, 99, length), -rng.random(length).astype(np.float32), "stop", f"{name} {length}"
        )
        for length in lengths
    )
    rewards = np.array([1.0] * successes + [0.0] * (trials - successes))
    parts = {"exact_match": rewards}
    return Group(name, rng.integers(0, 99, 3), completions, rewards, successes, version, "train", parts)


def fifo(**options) -> FifoReplay:
    return FifoReplay(FifoConfig(**options), CONTEXT)


def names_in(buffer: FifoReplay, version: int = 0) -> set[str]:
    """Ask a copy of the buffer for all it would give."""
    copy = FifoReplay(buffer.config, CONTEXT)
    copy.load_state_dict(buffer.state_dict())
    drawn = copy.draw(10_000, version, NOBODY, np.random.default_rng(0))
    return {group.question_id for group in drawn}


def assert_bit_equal(first: Group, second: Group) -> None:
    np.testing.assert_equal(first.to_state(), second.to_state())
    for ours, theirs in zip(first.completions, second.completions, strict=True):
        assert ours.behaviour_logprobs.dtype == theirs.behaviour_logprobs.dtype
        assert ours.behaviour_logprobs.tobytes() == theirs.behaviour_logprobs.tobytes()


def test_only_groups_with_successes_and_failures_enter():
    buffer = fifo()
    buffer.offer([group_of("never", 0), group_of("once", 1), group_of("always", 4), group_of("mostly", 3)])
    assert names_in(buffer) == {"once", "mostly"}
    assert buffer.num_ready(0) == 2


def test_the_oldest_leaves_first():
    buffer = fifo(capacity=2)
    buffer.offer([group_of("a"), group_of("b")])
    buffer.offer([group_of("c")])
    assert names_in(buffer) == {"b", "c"}


def test_the_newest_group_of_a_question_takes_the_place_at_the_end():
    buffer = fifo(capacity=2)
    buffer.offer([group_of("a"), group_of("b")])
    buffer.offer([group_of("a", version=1)])
    buffer.offer([group_of("c", version=1)])
    assert names_in(buffer) == {"a", "c"}
    assert {group.policy_version for group in buffer.draw(2, 1, NOBODY, np.random.default_rng(0))} == {1}


def test_a_group_older_than_the_one_kept_is_let_go():
    buffer = fifo()
    buffer.offer([group_of("a", version=2), group_of("a", version=1)])
    assert [group.policy_version for group in buffer.draw(1, 2, NOBODY, np.random.default_rng(0))] == [2]


def test_an_uninformative_group_leaves_the_earlier_one_in_place():
    buffer = fifo()
    buffer.offer([group_of("a", version=0)])
    buffer.offer([group_of("a", 4, version=1)])
    assert buffer.num_ready(1) == 1


def test_drawn_groups_stay():
    buffer = fifo()
    buffer.offer([group_of("a"), group_of("b")])
    for seed in range(3):
        assert len(buffer.draw(2, seed, NOBODY, np.random.default_rng(seed))) == 2


def test_questions_trained_fresh_are_never_drawn():
    buffer = fifo()
    buffer.offer([group_of("a"), group_of("b"), group_of("c")])
    drawn = buffer.draw(3, 0, frozenset({"a", "c"}), np.random.default_rng(0))
    assert [group.question_id for group in drawn] == ["b"]
    assert buffer.num_ready(0) == 3


def test_groups_older_than_max_staleness_are_not_ready():
    buffer = fifo(max_staleness=2)
    buffer.offer([group_of("old", version=1), group_of("new", version=3)])
    assert [buffer.num_ready(version) for version in (3, 4, 5, 6)] == [2, 1, 1, 0]
    assert [group.question_id for group in buffer.draw(2, 4, NOBODY, np.random.default_rng(0))] == ["new"]


def test_a_group_leaves_after_max_uses():
    buffer = fifo(max_uses=2)
    buffer.offer([group_of("a")])
    assert [len(buffer.draw(1, 0, NOBODY, np.random.default_rng(0))) for _ in range(3)] == [1, 1, 0]
    assert buffer.num_ready(0) == 0


def test_every_group_is_drawn_equally_often():
    buffer, rng = fifo(), np.random.default_rng(0)
    buffer.offer([group_of(name) for name in "abcde"])
    counts = dict.fromkeys("abcde", 0)
    for _ in range(5000):
        for group in buffer.draw(2, 0, NOBODY, rng):
            counts[group.question_id] += 1
    assert all(abs(count - 2000) < 175 for count in counts.values())  # 5 standard deviations


def arithmetic_of(num_replayed: int) -> BatchArithmetic:
    return BatchArithmetic(10, 32, 8, 2, num_replayed, 32, 512, 256)


def test_a_capacity_below_one_draw_is_a_problem_that_names_both_numbers():
    assert list(FifoConfig(capacity=15).problems(arithmetic_of(16))) == [
        (
            "capacity",
            "15 groups are fewer than the 16 that a step replays (training.questions_per_step 32 less 16 "
            "fresh), so replay can never start; raise replay.capacity or training.fresh_fraction",
        )
    ]
    assert list(FifoConfig(capacity=16).problems(arithmetic_of(16))) == []


def test_none_gives_nothing():
    buffer = NoneReplay(NoneConfig(), CONTEXT)
    buffer.offer([group_of("a")])
    assert buffer.num_ready(0) == 0
    assert list(buffer.draw(3, 0, NOBODY, np.random.default_rng(0))) == []
    assert not NoneReplay.replays


def test_a_state_from_a_larger_buffer_is_cut_to_the_capacity():
    buffer = fifo(capacity=3)
    buffer.offer([group_of(name) for name in "abc"])
    smaller = fifo(capacity=2)
    smaller.load_state_dict(buffer.state_dict())
    assert names_in(smaller) == {"b", "c"}


offers = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 4)), max_size=6), min_size=1, max_size=8
)


@given(
    offers=offers,
    capacity=st.integers(1, 5),
    max_staleness=st.none() | st.integers(1, 3),
    max_uses=st.none() | st.integers(1, 2),
    count=st.integers(0, 6),
    excluded=st.frozensets(st.sampled_from("abcdefgh"), max_size=4),
    seed=st.integers(0, 99),
)
def test_whatever_happens_the_buffer_keeps_its_promises(
    offers, capacity, max_staleness, max_uses, count, excluded, seed
):
    buffer = fifo(capacity=capacity, max_staleness=max_staleness, max_uses=max_uses)
    offered: dict[tuple[str, int], Group] = {}
    uses: dict[tuple[str, int], int] = {}
    for version, batch in enumerate(offers):
        groups = {name: group_of(name, successes, version) for name, successes in batch}
        resumed = FifoReplay(buffer.config, CONTEXT)
        resumed.load_state_dict(buffer.state_dict())
        num_ready = buffer.num_ready(version)
        drawn = buffer.draw(count, version, excluded, np.random.default_rng([seed, version]))
        again = resumed.draw(count, version, excluded, np.random.default_rng([seed, version]))
        assert [group.question_id for group in drawn] == [group.question_id for group in again]
        np.testing.assert_equal(buffer.state_dict(), resumed.state_dict())
        names = [group.question_id for group in drawn]
        assert len(set(names)) == len(names) <= min(count, num_ready)
        assert len(names) >= min(count, num_ready - len(excluded))
        assert excluded.isdisjoint(names)
        for group in drawn:
            key = (group.question_id, group.policy_version)
            uses[key] = uses.get(key, 0) + 1
            assert_bit_equal(group, offered[key])
            assert group.is_informative
            assert max_uses is None or uses[key] <= max_uses
            assert max_staleness is None or version - group.policy_version <= max_staleness
        buffer.offer(list(groups.values()))
        offered |= {(name, version): group for name, group in groups.items()}
        kept = buffer.state_dict()["groups"]
        assert len(kept) <= capacity
        assert len({item["question_id"] for item in kept}) == len(kept)
        assert buffer.num_ready(version) <= capacity


@pytest.mark.parametrize("options", [{"capacity": 0}, {"max_staleness": 0}, {"max_uses": 0}])
def test_limits_below_one_are_refused(options):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        FifoConfig(**options)
