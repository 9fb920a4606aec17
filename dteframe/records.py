"""What passes between the stages of a step: frozen records that answer simple questions about themselves.

Numbers are called ``success_rate`` (in [0, 1], up is easier); *difficulty* is the idea, ``1 - success_rate``.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

JsonValue: TypeAlias = "None | bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue]"
State: TypeAlias = "Mapping[str, StateValue]"
StateValue: TypeAlias = (
    "None | bool | int | float | str | np.ndarray | Sequence[StateValue] | Mapping[str, StateValue]"
)
Message: TypeAlias = Mapping[str, str]
"""One chat message: ``{"role": "user", "content": "..."}``."""
Purpose: TypeAlias = Literal["train", "reference", "evaluation"]
"""What a generated token is charged to."""
RewardStatus: TypeAlias = Literal["scored", "unparseable", "timeout", "error"]
"""What became of scoring a completion: a reward; no answer was found in it, which counts as 0; the reward
took too long; it failed. The last two are *failures*."""
FAILURES: tuple[RewardStatus, ...] = ("timeout", "error")
"""The statuses of completions that no reward could score."""


@dataclass(frozen=True, slots=True)
class Question:
    """A training item: what is asked, and what the answer is."""

    id: str
    """Unique in the run; stays the same when other questions are filtered out or reordered."""
    text: str
    """The question alone, without instructions or chat template: what estimators embed and what duplicates
    are found by."""
    prompt: str | tuple[Message, ...]
    """What the policy is asked: plain text, or chat messages for the tokenizer's template."""
    answer: str
    """The gold answer, as the reward expects it."""
    solution: str | None = None
    """A worked solution that ends in the answer, where the dataset has one: what a policy is warmed up on."""
    columns: Mapping[str, JsonValue] = field(default_factory=dict)
    """The dataset's further columns, for rewards and estimators that declare them."""

    @property
    def text_hash(self) -> str:
        """Hash the text up to whitespace: 16 hexadecimal digits, equal for questions that count as one."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Questions:
    """What a dataset loads."""

    train: tuple[Question, ...]
    evaluation: tuple[Question, ...] = ()
    """The dataset's own held-out questions; empty if it has none, then the engine holds some of ``train``
    out."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that could not be used, counted by reason."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the policy's tokens."""

    question_id: str
    token_ids: Int[np.ndarray, "prompt"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled; the names and their meaning are TRL's."""

    temperature: float = 1.0
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest; 0 is off."""
    max_completion_length: int = 256
    """Tokens, the end-of-sequence token included."""

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens cannot be sampled, so that the sampled distribution is not the model's."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy answered once."""

    token_ids: Int[np.ndarray, "completion"]
    """At least one token; ends in the end-of-sequence token if ``finish_reason`` is ``stop``."""
    behaviour_logprobs: Float[np.ndarray, "completion"]
    """Nats, at the sampling temperature, of the distribution that was sampled from."""
    finish_reason: Literal["stop", "length"]
    text: str
    """Decoded without special tokens: what rewards see."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one question from one policy version."""

    question_id: str
    prompt_token_ids: Int[np.ndarray, "prompt"]
    completions: tuple[Completion, ...]
    rewards: Float[np.ndarray, "group"]
    """One per completion: the weighted sum of the recipe's rewards."""
    successes: int
    """Completions that the first reward accepts (its score is at least ``training.success_threshold``)."""
    policy_version: int
    """Number of training steps that the policy had behind it when it answered."""
    purpose: Purpose
    reward_parts: Mapping[str, Float[np.ndarray, "group"]] = field(default_factory=dict)
    """Unweighted scores by reward name."""
    reward_statuses: tuple[RewardStatus, ...] = ()
    """One per completion; empty where all were scored."""
    reward_errors: tuple[str, ...] = ()
    """What failed, one per completion, empty texts where nothing did; empty where all were scored."""

    @property
    def num_failures(self) -> int:
        """Count the completions that the rewards could not score."""
        return sum(status in FAILURES for status in self.reward_statuses)

    @property
    def trials(self) -> int:
        """Count the rollouts."""
        return len(self.completions)

    @property
    def success_rate(self) -> float:
        """Divide successes by trials."""
        return self.successes / self.trials

    @property
    def is_informative(self) -> bool:
        """Whether the policy both succeeded and failed."""
        return 0 < self.successes < self.trials

    @property
    def has_equal_rewards(self) -> bool:
        """Whether every advantage is 0, so that the group has no policy gradient."""
        return bool(np.all(self.rewards == self.rewards[0]))

    @property
    def has_finite_logprobs(self) -> bool:
        """Whether the sampler gave every token a log-prob that can be trained on."""
        return all(np.isfinite(item.behaviour_logprobs).all() for item in self.completions)

    @property
    def num_tokens(self) -> int:
        """Count the completions' tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)

    def to_state(self) -> State:
        """Give the group as JSON values and a few arrays, for a component's ``state_dict``."""
        return {
            "question_id": self.question_id,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": np.concatenate([completion.token_ids for completion in self.completions]),
            "behaviour_logprobs": np.concatenate([item.behaviour_logprobs for item in self.completions]),
            "lengths": [len(completion.token_ids) for completion in self.completions],
            "finish_reasons": [completion.finish_reason for completion in self.completions],
            "texts": [completion.text for completion in self.completions],
            "rewards": self.rewards,
            "successes": self.successes,
            "policy_version": self.policy_version,
            "purpose": self.purpose,
            "reward_parts": dict(self.reward_parts),
            "reward_statuses": list(self.reward_statuses),
            "reward_errors": list(self.reward_errors),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Group:
        """Rebuild the group of ``to_state``, bit for bit."""
        ends = np.cumsum(state["lengths"])[:-1]
        columns = zip(
            np.split(state["token_ids"], ends),
            np.split(state["behaviour_logprobs"], ends),
            state["finish_reasons"],
            state["texts"],
            strict=True,
        )
        kept = set(state) - {"token_ids", "behaviour_logprobs", "lengths", "finish_reasons", "texts"}
        values = {name: state[name] for name in kept}
        values |= {name: tuple(state[name]) for name in ("reward_statuses", "reward_errors")}
        return cls(completions=tuple(Completion(*column) for column in columns), **values)


@dataclass(frozen=True, slots=True)
class Observation:
    """Measured successes of some questions under one policy version."""

    question_ids: tuple[str, ...]
    successes: Int[np.ndarray, "questions"]
    trials: Int[np.ndarray, "questions"]
    """Rollouts per question, at least 1."""
    policy_version: int
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class SuccessEstimate:
    """How often the present policy would solve each question: a Beta distribution per question."""

    question_ids: tuple[str, ...]
    mean: Float[np.ndarray, "questions"]
    """Expected success rate, in [0, 1]."""
    evidence: Float[np.ndarray, "questions"]
    """Rollouts that the mean is worth: the rate is Beta(mean * evidence, (1 - mean) * evidence); 0 is no
    idea."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The estimator's own figures about this estimate, such as ``leave_one_out_pearson``; reported as
    ``estimate/NAME``."""
    is_ascending: bool = False
    """Whether the ids ascend, as ``in_order`` makes them: a question is then found by bisection, however big
    the pool."""

    def in_order(self) -> SuccessEstimate:
        """Put the questions into ascending order of ids: what is drawn then hangs on the ids alone."""
        if self.is_ascending:
            return self
        places = sorted(range(len(self.question_ids)), key=self.question_ids.__getitem__)
        ids = tuple(self.question_ids[place] for place in places)
        return SuccessEstimate(ids, self.mean[places], self.evidence[places], self.figures, is_ascending=True)

    def places(self, question_ids: Iterable[str]) -> Int[np.ndarray, "wanted"]:
        """Find questions; those that are not there are left out."""
        if self.is_ascending:
            found = ((bisect_left(self.question_ids, name), name) for name in question_ids)
            there = [place for place, name in found if self.question_ids[place : place + 1] == (name,)]
        else:
            index = {name: place for place, name in enumerate(self.question_ids)}
            there = [index[name] for name in question_ids if name in index]
        return np.array(there, np.int64)

    def without(self, question_ids: frozenset[str]) -> SuccessEstimate:
        """Leave some questions out."""
        is_kept = np.ones(len(self.question_ids), bool)
        is_kept[self.places(question_ids)] = False
        ids = tuple(compress(self.question_ids, is_kept.tobytes()))
        return replace(self, question_ids=ids, mean=self.mean[is_kept], evidence=self.evidence[is_kept])

    def restricted(self, question_ids: tuple[str, ...]) -> SuccessEstimate:
        """Look some questions up, in the order given; all of them are there."""
        places = self.places(question_ids)
        assert len(places) == len(question_ids)
        return SuccessEstimate(question_ids, self.mean[places], self.evidence[places], self.figures)


@dataclass(frozen=True, slots=True)
class Selection:
    """The questions that a selector chose, in the order in which they are to be asked."""

    question_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Review:
    """What a selector makes of a round of fresh groups, once they are scored."""

    accepted: tuple[str, ...]
    """Questions whose groups may be trained on; those of the round's others are rejected."""
    num_more: int = 0
    """Questions to ask in another round of the step; 0 is none, and nobody asks where none is missing."""


LEAST_GAIN = 1.25
"""Informative groups per rollout that a perfect choice must have over a uniform one for selection to pay:
estimators reach about nine tenths of the best possible, and the rest has to be worth their cost."""


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """How many of everything there is in a step and in a plan; what ``dteframe plan`` explains."""

    max_steps: int
    questions_per_step: int
    """Groups in a step, fresh and replayed."""
    num_generations: int
    selection_interval: int
    """Steps that one plan serves."""
    num_replayed: int
    """Groups of a step that come from the replay buffer once it is full enough."""
    reference_size: int
    """Reference questions rolled out per plan."""
    max_prompt_length: int
    max_completion_length: int
    questions_per_group: float = 1.0
    """Questions asked at first for each fresh group that a step wants: above 1 where the selector's review
    rejects some."""

    def num_asked(self, num_groups: int) -> int:
        """Count the questions to ask at first so that, after the review, ``num_groups`` groups are left."""
        # 1.1 x 10 is a little more than 11 in floats; without the margin 12 would be asked.
        return math.ceil(num_groups * self.questions_per_group - 1e-9)

    @property
    def num_fresh(self) -> int:
        """Count the groups of a step that are generated, once replay runs."""
        return self.questions_per_step - self.num_replayed

    def best_gain(self, uniform_informative_fraction: float, *, reuses_references: bool) -> float:
        """Say how many informative groups per rollout a perfect choice has, over a uniform one.

        Every chosen group would be informative; references, drawn uniformly, are paid too, and the
        informative ones among them are trained on in place of chosen groups where they are reused.
        """
        informative_references = self.reference_size * uniform_informative_fraction
        num_reused = min(informative_references, self.num_fresh) if reuses_references else 0.0
        num_trained = self.num_fresh * self.selection_interval
        num_paid = num_trained - num_reused + self.reference_size
        return num_trained / num_paid / max(uniform_informative_fraction, 1e-9)

    def break_even(self, *, reuses_references: bool) -> float:
        """Give the uniform share of informative groups above which the best gain is below ``LEAST_GAIN``."""
        shares = [percent / 100 for percent in range(1, 101)]
        gains = [self.best_gain(share, reuses_references=reuses_references) for share in shares]
        return max(
            (share for share, gain in zip(shares, gains, strict=True) if gain >= LEAST_GAIN), default=0.0
        )

    @property
    def questions_per_plan(self) -> int:
        """Count the questions that a plan chooses at most: all of its steps without replay."""
        return self.num_asked(self.questions_per_step) * self.selection_interval


@dataclass(frozen=True, slots=True)
class CreditedGroup:
    """A group with what each of its rollouts is worth."""

    group: Group
    advantages: Float[np.ndarray, "group"]
    is_replayed: bool
    staleness: int
    """Policy versions between the one that answered and the present one; 0 for fresh groups."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a decoder like Qwen2 or Llama: what its memory and its work follow from."""

    num_parameters: int
    """All of them; a matrix that input and output share counts once."""
    parameter_bytes: int
    """Bytes of a parameter where the model computes: 4 or 2."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary_size: int
    ties_embeddings: bool
    """Whether input and output share one embedding matrix."""
    num_adapter_parameters: int = 0
    """LoRA's, float32, on top of ``num_parameters``; 0 without LoRA, when all parameters are trained."""
    assumption: str | None = None
    """What had to be assumed, where something is known only when the model is loaded."""
    shares_prompts: bool = False
    """Whether an update may compute a prompt once for several completions."""

    @property
    def num_trained(self) -> int:
        """Count the parameters that the optimizer changes."""
        return self.num_adapter_parameters or self.num_parameters

    @property
    def query_size(self) -> int:
        """Give the width of a token's queries over all heads."""
        return self.num_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Give the width of a token's keys, and of its values, over all heads."""
        return self.num_key_value_heads * self.head_size


@dataclass(frozen=True, slots=True)
class SamplingMemory:
    """What a rollout takes on the device of one process, beside the policy that is trained."""

    while_sampling: Mapping[str, int]
    """Bytes by what they are for, such as ``keys and values``."""
    while_updating: int = 0
    """Bytes that stay taken during the update."""
    remark: str | None = None
    """What else people should know, such as how many completions fit."""
