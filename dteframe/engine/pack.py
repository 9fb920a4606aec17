"""Deal the groups of a step to minibatches, and items of unlike size to shares of like size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dteframe.records import Completion, CreditedGroup


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout that is run through the model."""

    index: int
    """Unique in the step: what is known of a row is remembered under it."""
    group: CreditedGroup
    completion: Completion
    advantage: float

    @property
    def question_id(self) -> str:
        """Name the question."""
        return self.group.group.question_id

    @property
    def is_replayed(self) -> bool:
        """Whether the rollout came from the replay buffer."""
        return self.group.is_replayed

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and completion."""
        return len(self.group.group.prompt_token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What one optimizer step learns from."""

    groups: tuple[CreditedGroup, ...]
    """All of them, those of equal rewards included."""
    rows: tuple[Row, ...]
    """The rollouts that carry a gradient; empty if no group does."""

    @property
    def unequal_share(self) -> float:
        """Give the share of groups whose rewards differ."""
        return 1 - sum(credited.group.has_equal_rewards for credited in self.groups) / len(self.groups)

    @property
    def num_rollouts(self) -> int:
        """Count the rollouts of all groups: a denominator of the loss."""
        return sum(credited.group.trials for credited in self.groups)

    @property
    def num_tokens(self) -> int:
        """Count the completion tokens of all groups: a denominator of the loss."""
        return sum(credited.group.num_tokens for credited in self.groups)


def pack(
    credited: Sequence[CreditedGroup],
    num_minibatches: int,
    equal_rewards_carry_gradient: bool,
    rng: np.random.Generator,
) -> tuple[Minibatch, ...]:
    """Deal groups to minibatches of equal make-up.

    Args:
        credited: the groups of a step.
        num_minibatches: 1 or more; with fewer groups there are as many minibatches as groups.
        equal_rewards_carry_gradient: whether groups of equal rewards are run too.
        rng: the only source of chance.

    Raises:
        ValueError: a log-prob or advantage is not finite; names the question.
    """
    rows: list[tuple[Row, ...]] = []
    num_rows = 0
    for item in credited:
        is_run = equal_rewards_carry_gradient or not item.group.has_equal_rewards
        rows.append(rows_of(item, num_rows) if is_run else ())
        num_rows += len(rows[-1])
    minibatches = []
    for dealt in deal(credited, min(num_minibatches, len(credited)), rng):
        groups = tuple(credited[index] for index in dealt)
        minibatches.append(Minibatch(groups, tuple(row for index in dealt for row in rows[index])))
    return tuple(minibatches)


def deal(
    credited: Sequence[CreditedGroup], num_hands: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Deal shuffled groups like cards, one kind after the other: fresh, replayed; unequal rewards first.

    Every kind, all fresh ones, and all groups are runs of the dealt order, so their counts differ by at most
    one between hands. It follows that the fresh share of a hand is that of the batch within one group.

    Returns:
        Positions in ``credited`` of the groups of each hand.
    """
    shuffled = [int(index) for index in rng.permutation(len(credited))]
    ordered = sorted(
        shuffled, key=lambda index: (credited[index].is_replayed, credited[index].group.has_equal_rewards)
    )
    hands = [tuple(ordered[start::num_hands]) for start in range(num_hands)]
    return [hands[index] for index in rng.permutation(num_hands)]


def balanced(sizes: Sequence[int], num_shares: int) -> tuple[tuple[int, ...], ...]:
    """Deal items to shares of like total size: the largest first, each to the share that has least so far.

    Returns:
        Positions in ``sizes`` of the items of each share, in their own order; a share may be empty.

    >>> balanced([5, 1, 4, 2], 2)
    ((0, 1), (2, 3))
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = totals.index(min(totals))
        shares[lightest].append(index)
        totals[lightest] += sizes[index]
    return tuple(tuple(sorted(share)) for share in shares)


def rows_of(credited: CreditedGroup, first_index: int) -> tuple[Row, ...]:
    """Give the rollouts of a group as rows, numbered from ``first_index``.

    Raises:
        ValueError: a log-prob or an advantage is not finite; names the question and the rollout.
    """
    rows = []
    pairs = zip(credited.group.completions, credited.advantages, strict=True)
    for number, (completion, advantage) in enumerate(pairs):
        lowest = float(np.min(completion.behaviour_logprobs))
        if not np.isfinite(completion.behaviour_logprobs).all() or not np.isfinite(advantage):
            raise ValueError(
                f"question {credited.group.question_id!r}: rollout {number} has advantage "
                f"{float(advantage)!r} and a lowest behaviour log-prob of {lowest!r} nats; "
                "both must be finite"
            )
        rows.append(Row(first_index + number, credited, completion, float(advantage)))
    return tuple(rows)
