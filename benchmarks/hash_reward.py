"""The reward of the benchmarks as a plugin: a hash of the completion, or the same for all of a group."""

from collections.abc import Sequence
from typing import Literal, final

from workloads import reward_of

from dteframe import Completion, Question, Reward, RewardConfig, hookimpl


class HashRewardConfig(RewardConfig):
    """Without options."""

    type: Literal["hash_reward"] = "hash_reward"


@final
class HashReward(Reward):
    """Score by ``reward_of``; the gold answer says whether all are alike."""

    config: HashRewardConfig

    def score(self, question: Question, completions: Sequence[Completion]) -> Sequence[float]:
        """Score each completion."""
        is_equal = question.answer == "equal"
        return [reward_of(question.text, completion.text, is_equal) for completion in completions]


@hookimpl
def dteframe_components() -> list[type[Reward]]:
    """Add ``type: hash_reward``."""
    return [HashReward]
