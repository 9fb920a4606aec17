"""Ask the fresh groups of a step, in rounds: a selector may turn groups away and ask for others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dteframe.engine import calls
from dteframe.engine.answer import answer
from dteframe.engine.choose import Uses, choose
from dteframe.engine.setup import Setup
from dteframe.records import Group, SuccessEstimate
from dteframe.reports import ReviewReport


@dataclass(slots=True)
class Spare:
    """The questions that a step may ask beyond those that its plan has for it."""

    estimate: SuccessEstimate
    """Over the whole pool."""
    taken: set[str]
    """Asked or replayed in this step, or left for the next steps of the plan."""
    uses: Uses
    covered: set[str] = field(default_factory=set)
    """Chosen ones that were drawn uniformly."""
    figures: Counter[str] = field(default_factory=Counter)
    """How the selector's rules had their say in all choices together."""

    def choose(self, setup: Setup, step: int, count: int, stage: str) -> tuple[str, ...]:
        """Have the selector choose ``count`` of them, or all that there are, and take them."""
        if count == 0:
            return ()
        with setup.meter.stage("select"):
            free = self.estimate.without(frozenset(self.taken))
            count = min(count, len(free.question_ids))
            rng = setup.streams(step, stage)
            num_generations = setup.arithmetic.num_generations
            choice = choose(setup.parts.selector, free, count, step, self.uses, num_generations, rng)
        self.taken.update(choice.question_ids)
        self.covered.update(choice.covered)
        self.figures.update(choice.figures)
        return choice.question_ids


@dataclass(slots=True)
class Rounds:
    """What a step asked, and what became of it."""

    num_wanted: int
    """Groups that the step has room for."""
    groups: list[Group] = field(default_factory=list)
    """Everything that was answered, in the order of asking."""
    accepted: list[Group] = field(default_factory=list)
    """What the step trains on: ``num_wanted`` groups, or fewer."""
    surplus: list[Group] = field(default_factory=list)
    """Accepted too, but the step has no room for them."""
    num_rejected: int = 0
    num_more: int = 0
    """Questions that the selector wants to ask in another round."""
    num_rounds: int = 0

    @property
    def num_missing(self) -> int:
        """Count the groups that the step still wants."""
        return self.num_wanted - len(self.accepted)

    @property
    def num_unused_tokens(self) -> int:
        """Count the tokens of rejected and surplus groups."""
        asked = sum(group.num_tokens for group in self.groups)
        return asked - sum(group.num_tokens for group in self.accepted)

    def report(self) -> ReviewReport:
        """Sum the rounds up."""
        return ReviewReport(
            num_rounds=self.num_rounds,
            num_asked=len(self.groups),
            num_accepted=len(self.accepted),
            num_rejected=self.num_rejected,
            num_surplus=len(self.surplus),
            num_missing=self.num_missing,
            unused_tokens=self.num_unused_tokens,
        )


def ask_in_rounds(
    setup: Setup, step: int, question_ids: Sequence[str], num_wanted: int, spare: Spare
) -> Rounds:
    """Ask questions until ``num_wanted`` groups are accepted, the selector gives up, or rounds run out.

    Args:
        setup: the run.
        step: the one that asks.
        question_ids: of the first round.
        num_wanted: groups that the step has room for.
        spare: what further rounds may ask.
    """
    rounds = Rounds(num_wanted)
    selector = setup.parts.selector
    while question_ids:
        rounds.num_rounds += 1
        stage = "answers" if rounds.num_rounds == 1 else f"answers_{rounds.num_rounds}"
        rng = setup.streams(step, stage)
        answer(setup, question_ids, "train", step, rng, partial(_take, setup, rounds))
        may_go_on = rounds.num_missing > 0 and rounds.num_rounds < selector.config.rounds_per_step()
        stage = f"more_{rounds.num_rounds}"
        question_ids = spare.choose(setup, step, rounds.num_more, stage) if may_go_on else ()
    if selector.reviews and rounds.num_missing:
        setup.context.warn(
            f"selector {selector.config.type!r}: a step trains on fewer groups than "
            "training.questions_per_step, because too few of those that were asked were accepted; metric "
            "review/num_missing counts them in every step; ask more questions, or in more rounds"
        )
    return rounds


def _take(setup: Setup, rounds: Rounds, groups: Sequence[Group]) -> Mapping[str, str]:
    """Have the selector review a round, and say which of its groups nobody will train on, and why."""
    selector, room = setup.parts.selector, rounds.num_missing
    rounds.groups += groups
    if not selector.reviews:
        rounds.accepted += groups
        return {}
    with setup.meter.stage("select"):
        review = calls.review(selector, groups, room)
    names = frozenset(review.accepted)
    accepted = [group for group in groups if group.question_id in names]
    rejected = [group for group in groups if group.question_id not in names]
    rounds.accepted += accepted[:room]
    rounds.surplus += accepted[room:]
    rounds.num_rejected += len(rejected)
    rounds.num_more = review.num_more
    unused = dict.fromkeys((group.question_id for group in rejected), "rejected")
    return unused | dict.fromkeys((group.question_id for group in accepted[room:]), "surplus")
