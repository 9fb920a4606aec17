"""What every replay buffer promises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dteframe.contracts import Replay
from dteframe.records import Group
from dteframe.testing.subject import (
    Subject,
    copy_of_group,
    copy_of_state,
    group_of,
    insist,
    insist_on_storable_state,
    same_value,
)

EVERYTHING = 1000
"""More groups than any check offers."""


def empty_buffer_is_safe(subject: Subject) -> None:
    """A buffer that was offered nothing has nothing ready and draws nothing."""
    replay: Replay = subject.make()
    insist(replay.num_ready(0) == 0, f"num_ready is {replay.num_ready(0)} before the first offer")
    drawn = replay.draw(4, 0, frozenset(), np.random.default_rng(0))
    insist(len(drawn) == 0, f"{len(drawn)} groups from an empty buffer")
    replay.offer([])
    insist(replay.num_ready(0) == 0, "an offer of no groups made some ready")


def draw_gives_at_most_as_many_distinct_questions_as_asked(subject: Subject) -> None:
    """``draw`` gives ``count`` groups or fewer, each of another question; 0 gives none."""
    replay = _filled(subject)
    for count in (0, 1, 3, EVERYTHING):
        ids = [
            group.question_id for group in replay.draw(count, 2, frozenset(), np.random.default_rng(count))
        ]
        insist(len(ids) <= count, f"{len(ids)} groups instead of at most {count}")
        insist(len(set(ids)) == len(ids), f"a question is drawn twice: {sorted(ids)}")


def excluded_questions_are_never_drawn(subject: Subject) -> None:
    """Questions in ``excluded`` are trained fresh in the same step."""
    replay = _filled(subject)
    excluded = frozenset(question.id for question in subject.questions[::2])
    drawn = replay.draw(EVERYTHING, 2, excluded, np.random.default_rng(0))
    wrong = {group.question_id for group in drawn} & excluded
    insist(not wrong, f"drew the excluded {sorted(wrong)}")


def groups_come_back_bit_equal(subject: Subject) -> None:
    """What is drawn was offered, with the same tokens, log-probs, rewards and policy version."""
    replay: Replay = subject.make()
    offered = _offers(subject)
    kept = {
        (item.question_id, item.policy_version): copy_of_group(item) for groups in offered for item in groups
    }
    for groups in offered:
        replay.offer(groups)
    for group in replay.draw(EVERYTHING, 2, frozenset(), np.random.default_rng(0)):
        original = kept.get((group.question_id, group.policy_version))
        insist(original is not None, f"question {group.question_id!r} was not offered at that version")
        same = original is not None and same_value(group.to_state(), original.to_state())
        insist(same, f"the group of question {group.question_id!r} was changed")


def num_ready_is_what_can_be_drawn(subject: Subject) -> None:
    """``num_ready`` counts what ``draw`` gives when nothing is excluded; asking does not change it."""
    replay = _filled(subject)
    ready = [replay.num_ready(2), replay.num_ready(2)]
    insist(ready[0] == ready[1], f"num_ready is {ready[0]}, and {ready[1]} when asked again")
    drawn = len(replay.draw(EVERYTHING, 2, frozenset(), np.random.default_rng(0)))
    insist(drawn == ready[0], f"num_ready is {ready[0]} but {drawn} groups are drawn")


def replays_if_and_only_if_it_says_so(subject: Subject) -> None:
    """With ``replays = True`` fresh informative groups can be drawn later; with False nothing ever is."""
    replay = _filled(subject)
    drawn = len(replay.draw(EVERYTHING, 2, frozenset(), np.random.default_rng(0)))
    insist((drawn > 0) == replay.replays, f"replays is {replay.replays} but {drawn} groups are drawn")


def equal_generators_give_equal_draws(subject: Subject) -> None:
    """The generator that ``draw`` gets is its only source of chance."""
    drawn = [_filled(subject).draw(3, 2, frozenset(), np.random.default_rng(5)) for _ in range(2)]
    insist(_ids(drawn[0]) == _ids(drawn[1]), f"{_ids(drawn[0])} and {_ids(drawn[1])} from equal generators")


def state_brings_back_the_buffer(subject: Subject) -> None:
    """A new buffer that is given the state draws what the first one would have drawn next."""
    before = _filled(subject)
    before.draw(3, 2, frozenset(), np.random.default_rng(0))
    insist_on_storable_state(before)
    after: Replay = subject.make()
    after.load_state_dict(copy_of_state(before))
    insist(same_value(after.state_dict(), before.state_dict()), "the state changed on its way")
    for version in (2, 3, 4):
        insist(before.num_ready(version) == after.num_ready(version), "the resumed buffer has another size")
        draws = [
            item.draw(3, version, frozenset(), np.random.default_rng(version)) for item in (before, after)
        ]
        states = [[group.to_state() for group in draw] for draw in draws]
        insist(same_value(*states), "the resumed buffer draws something else")


def _offers(subject: Subject) -> list[list[Group]]:
    """Give three offers: all informative, then equal rewards among them, then questions seen before."""
    ids = [question.id for question in subject.questions]
    first = [group_of(name, 1 + place % 3, policy_version=0) for place, name in enumerate(ids[:6])]
    second = [group_of(name, place % 5, policy_version=1) for place, name in enumerate(ids[6:12])]
    third = [group_of(name, 2, policy_version=1) for name in ids[4:5]]
    return [first, second, third]


def _filled(subject: Subject) -> Replay:
    replay: Replay = subject.make()
    for groups in _offers(subject):
        replay.offer(groups)
    return replay


def _ids(groups: Sequence[Group]) -> list[str]:
    return [group.question_id for group in groups]


PROMISES = (
    empty_buffer_is_safe,
    draw_gives_at_most_as_many_distinct_questions_as_asked,
    excluded_questions_are_never_drawn,
    groups_come_back_bit_equal,
    num_ready_is_what_can_be_drawn,
    replays_if_and_only_if_it_says_so,
    equal_generators_give_equal_draws,
    state_brings_back_the_buffer,
)
