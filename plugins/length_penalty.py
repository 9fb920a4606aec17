"""A reward against long answers: put it in the list after the reward that says what is right."""

from collections.abc import Sequence
from typing import Literal, Self, final

from pydantic import Field, model_validator

from dteframe import Completion, Question, Reward, RewardConfig, hookimpl


class LengthPenaltyConfig(RewardConfig):
    """Options of ``length_penalty``."""

    type: Literal["length_penalty"] = "length_penalty"
    free_tokens: int = Field(default=64, ge=0)
    """Tokens that cost nothing."""
    full_penalty_tokens: int = Field(default=256, ge=1)
    """Length from which the score is -1; above ``free_tokens``."""

    @model_validator(mode="after")
    def _ramp_goes_up(self) -> Self:
        if self.full_penalty_tokens <= self.free_tokens:
            raise ValueError(
                f"full_penalty_tokens is {self.full_penalty_tokens} and free_tokens {self.free_tokens}; "
                "the penalty must grow over at least one token"
            )
        return self


@final
class LengthPenalty(Reward):
    """Penalty for long answers: 0 up to a free length, then down to -1 in a straight line.

    Source: the soft overlong punishment of DAPO, arXiv:2503.14476, 3.4; ``free_tokens`` is its maximum
    length less the cache, ``full_penalty_tokens`` its maximum length.
    """

    config: LengthPenaltyConfig

    def score(self, question: Question, completions: Sequence[Completion]) -> Sequence[float]:
        """Score by length alone, in [-1, 0]."""
        free, full = self.config.free_tokens, self.config.full_penalty_tokens
        excess = [(len(completion.token_ids) - free) / (full - free) for completion in completions]
        return [-min(max(share, 0.0), 1.0) for share in excess]


@hookimpl
def dteframe_components() -> list[type[Reward]]:
    """Add ``type: length_penalty`` to the rewards."""
    return [LengthPenalty]
