"""What follows when rewards fail on completions, or take too long for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dteframe.engine.failure_watch import NOT_SCORED
from dteframe.engine.setup import Setup
from dteframe.errors import PluginError
from dteframe.records import FAILURES, Group

GIVEN_UP = "given up"
"""What stands for the status of completions that were not tried any more."""


def heed_failures(setup: Setup, step: int, groups: Sequence[Group]) -> None:
    """Warn of failures in groups that were asked at once, or stop where the recipe wants that.

    Raises:
        PluginError: there are more of them than ``training.max_reward_failure_fraction``, scoring was given
            up, or there is any at all where ``training.on_reward_failure`` is ``stop``; or with
            ``leave_out`` no group is left.
    """
    num_failures = sum(group.num_failures for group in groups)
    if num_failures == 0:
        return
    training = setup.recipe.training
    num_completions = sum(group.trials for group in groups)
    failures = [
        (GIVEN_UP if error.startswith(NOT_SCORED) else status, error, group)
        for group in groups
        if group.num_failures
        for status, error in zip(group.reward_statuses, group.reward_errors, strict=True)
        if status in FAILURES
    ]
    counts = Counter(how for how, _, _ in failures)
    what = ", ".join(f"{count} x {how}" for how, count in sorted(counts.items()))
    _, first, group = next((item for item in failures if item[0] != GIVEN_UP), failures[0])
    failed = (
        f"reward: {num_failures} of {num_completions} completions asked at step {step} for {group.purpose} "
        f"could not be scored ({what}); the first, to question {group.question_id!r}: {first}"
    )
    kept = f"all are in {setup.context.run_folder / 'reward_failures.jsonl'}"
    if training.on_reward_failure == "stop":
        raise PluginError(f"{failed}; training.on_reward_failure is 'stop'; {kept}")
    if counts[GIVEN_UP] or num_failures > training.max_reward_failure_fraction * num_completions:
        raise PluginError(
            f"{failed}; these are more than training.max_reward_failure_fraction "
            f"{training.max_reward_failure_fraction:g}: mend the reward, or raise that; {kept}"
        )
    is_left_out = training.on_reward_failure == "leave_out" and group.purpose == "train"
    if is_left_out and not without_failures(groups):
        raise PluginError(
            f"reward: each of the {len(groups)} groups asked at once holds a completion that could not be "
            "scored, and training.on_reward_failure is 'leave_out', so that none is left to train on; mend "
            "the reward, or count failures as 0 (training.on_reward_failure=zero)"
        )
    num_so_far = sum(setup.meter.reward_statuses[status] for status in FAILURES)
    # The 1st, 10th, 100th, ...: often enough to see, never a flood.
    if len(str(num_so_far)) > len(str(num_so_far - num_failures)) or num_so_far == num_failures:
        policy = "their groups are left out" if is_left_out else "they count as 0"
        setup.context.warn(f"{failed}; {policy}; {num_so_far} so far; {kept}")


def without_failures(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Leave out the training groups in which a completion could not be scored."""
    return tuple(group for group in groups if not (group.purpose == "train" and group.num_failures))
