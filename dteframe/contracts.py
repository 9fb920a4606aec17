"""One abstract class per kind of plugin, and the pydantic base of its configuration.

A plugin is one final class in one file. It annotates ``config`` with its own configuration class, whose
``type`` is the plugin's name in recipes; ``dteframe check FILE`` runs the promises of its kind
(``dteframe.testing``) over it. Heavy packages (torch, transformers, datasets) are imported inside methods:
listing and validating must stay cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field

from dteframe.full_weights import full_weights
from dteframe.records import (
    BatchArithmetic,
    Completion,
    Group,
    ModelSizes,
    Observation,
    Prompt,
    Question,
    Questions,
    Sampling,
    SamplingMemory,
    Selection,
    State,
    SuccessEstimate,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TextEncoder: TypeAlias = "Callable[[Sequence[str]], Float[np.ndarray, 'texts width']]"
"""Embeds texts; what the engine offers estimators as the policy's own view of a question."""


class PluginConfig(BaseModel):
    """The options of a plugin: strict, closed to unknown keys, with attribute docstrings as descriptions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    type: str
    """The plugin's name in recipes; a ``Literal`` with itself as default in every plugin."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Give a small valid configuration for the promises; write files that it needs to ``folder``."""
        return cls()  # type: ignore[call-arg]  # every plugin's type has a default

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with this configuration in a run of such a size: (own key, what)."""
        yield from ()

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Yield what should be known before a run, such as a file that is not here: (own key, what)."""
        yield from ()

    def missing_packages(self) -> Iterator[str]:
        """Yield a sentence for each package that a run would need and that is not installed.

        Asked before anything is loaded; a recipe is valid without them.
        """
        yield from ()


@dataclass(frozen=True, slots=True)
class Context:
    """What every component may know of its surroundings."""

    cache_folder: Path
    """For what is costly to make again; files in it are named by the hash of everything that they depend
    on."""
    run_folder: Path
    """Where the run's files go; exists."""
    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int
    progress: Callable[[str, int, int], None]
    """Tell people how far long work is: what is being done, steps done, steps in all."""
    warn: Callable[[str], None]
    """Tell people of something that was skipped, replaced or looks wrong: one sentence that names it."""


class Component(ABC):
    """What all kinds have in common: a configuration, a context, and state that survives a checkpoint."""

    kind: ClassVar[str]
    config: PluginConfig

    def __init__(self, config: Any, context: Context) -> None:
        """Keep both; do the work in the kind's own first method, not here."""
        self.config = config
        self.context = context

    def state_dict(self) -> State:
        """Give everything that must survive a checkpoint, and nothing else: JSON values and arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, bit for bit; called after the kind's own first method."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state but the checkpoint has {sorted(state)}")


@dataclass(slots=True)
class Policy:
    """The model in training: a module that transformers made, and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    lora_base_sha256: str | None = None
    """Of the frozen weights below a LoRA adapter, which the engine adds; None without one."""
    computes_in: torch.dtype | None = None
    """What parameters are cast to when they are used, where shards are of a finer type; None: their own."""

    @property
    def dtype(self) -> torch.dtype:
        """Give the type that the policy computes in: what a sampler's copy should have."""
        return self.computes_in or self.module.dtype

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give every parameter once, as ``save_pretrained`` would name it, whole and one at a time.

        For a sampler with weights of its own. Under several processes all must iterate together.
        """
        return full_weights(self.module)


class LoraOptions(BaseModel):
    """A low-rank adapter, trained instead of the model's own weights; names are peft's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    r: int = Field(default=16, ge=1)
    """Rank of the adapter's matrices."""
    lora_alpha: int = Field(default=32, ge=1)
    """The adapter's output is multiplied by ``lora_alpha / r``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped in training; above 0, importance ratios are noisy."""
    use_rslora: bool = False
    """Multiply by ``lora_alpha / sqrt(r)`` instead."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Linear layers that get an adapter, by the end of their names (``q_proj``); ``all-linear``: all but the
    output embedding."""


class ModelConfig(PluginConfig):
    """Options that every model has."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; a LoRA adapter's are float32 in any case."""
    lora: LoraOptions | None = None
    """Train a low-rank adapter and leave the model's own weights alone; null: train them all. Needs peft."""

    def missing_packages(self) -> Iterator[str]:
        """Ask for peft where there is an adapter."""
        if self.lora is not None and find_spec("peft") is None:
            yield (
                "model.lora: needs the package peft, which is not installed; "
                "install it with: pip install 'dteframe[lora]'"
            )

    def sizes(self) -> ModelSizes | None:
        """Give the model's sizes without torch, a download or a guess, or None where only loading tells.

        LoRA is left out of them.
        """
        return None


class Model(Component):
    """Which policy do we train?"""

    kind = "model"
    config: ModelConfig

    @abstractmethod
    def load(self, questions: Sequence[Question]) -> Policy:
        """Load or build the policy: on ``context.device``, in evaluation mode, its pad and end tokens set.

        Args:
            questions: the training questions, for a model that makes a tokenizer or warms up on worked
            solutions.
        """


class DatasetConfig(PluginConfig):
    """Options that every dataset has."""

    def num_questions(self) -> int | None:
        """Count the training questions, held-out ones included, or give None where only loading tells."""
        return None

    def has_evaluation_questions(self) -> bool:
        """Whether ``load`` will give evaluation questions of its own, so that none are held out."""
        return False


class Dataset(Component):
    """What can be asked?"""

    kind = "dataset"
    config: DatasetConfig

    @abstractmethod
    def load(self) -> Questions:
        """Read all questions; the engine removes duplicates of equal text and holds questions out.

        Raises:
            DataError: the source cannot be read, is empty, or lacks a column; the message names the file
            and the column.
        """


class RewardConfig(PluginConfig):
    """Options that every reward has."""

    weight: float = 1.0
    """Factor of this reward in the sum; the first reward of the list decides what a success is, whatever
    its weight."""

    @classmethod
    def example_questions(cls) -> Sequence[Question]:
        """Give at least 24 questions that it can score, for the promises; empty if small sums will do."""
        return ()


class Reward(Component):
    """How good is each completion?"""

    kind = "reward"
    config: RewardConfig

    @abstractmethod
    def score(self, question: Question, completions: Sequence[Completion]) -> Sequence[float]:
        """Score each completion of one question, in the same order; finite, usually in [0, 1].

        Must not change anything and give the same scores when called again: it may run in another process.
        """

    def problem_with(self, question: Question) -> str | None:
        """Say why this question can never be scored (an answer that does not parse, say), or None.

        Such questions are counted, named and left out before the run.
        """
        return None


class EstimatorConfig(PluginConfig):
    """Options that every estimator has."""

    def num_references(self) -> int:
        """Count the reference questions that ``references`` asks for at each plan."""
        return 0


class Estimator(Component):
    """How often would the present policy solve each question?"""

    kind = "estimator"
    config: EstimatorConfig
    estimates: ClassVar[bool] = True
    """False for an estimator that knows nothing, so that selectors which need an estimate can be refused."""

    @abstractmethod
    def start(self, questions: Sequence[Question], encode_with_policy: TextEncoder) -> None:
        """See the pool before the first plan.

        Args:
            questions: all training questions; ids are distinct.
            encode_with_policy: mean of the policy's last hidden states over a text, as it is before training.
        """

    def references(self, rng: np.random.Generator) -> Sequence[str]:
        """Name the questions to roll out before the next prediction; distinct; empty if none are wanted."""
        return ()

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take note of measured successes: of every generated training and reference group.

        The order of questions inside an observation must not matter.

        Raises:
            ValueError: a question is unknown; names it.
        """

    @abstractmethod
    def predict(self, policy_version: int) -> SuccessEstimate:
        """Estimate the success rate of every question of the pool under the policy of that version."""


class SelectorConfig(PluginConfig):
    """Options that every selector has; the engine sees to them."""

    cooldown: int = Field(default=0, ge=0)
    """Steps for which a chosen question is not chosen again; 0 is off."""
    max_uses: int | None = Field(default=None, ge=1)
    """How often a question is chosen in a run at most; null is without end. Where too few questions are left,
    those that have rested longest are brought back, and counted."""
    coverage_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of a choice that is drawn uniformly, whatever the estimate says: so that an estimator that learns
    from training groups sees more than what it expected."""


class Selector(Component):
    """Which questions next?"""

    kind = "selector"
    config: SelectorConfig
    needs_estimate: ClassVar[bool] = True
    """False for a selector that ignores the estimate's numbers."""

    def start(self, arithmetic: BatchArithmetic) -> None:
        """Learn the run's sizes before the first selection."""

    @abstractmethod
    def select(self, estimate: SuccessEstimate, count: int, rng: np.random.Generator) -> Selection:
        """Choose ``count`` distinct questions among the estimate's, in the order of asking.

        The estimate covers the questions that may be asked now: some of the pool may be missing.
        Raises ValueError if there are fewer than ``count``.
        """


class ReplayConfig(PluginConfig):
    """Options that every replay buffer has."""


class Replay(Component):
    """Which earlier groups join the batch?"""

    kind = "replay"
    config: ReplayConfig
    replays: ClassVar[bool] = True
    """False for a buffer that never gives a group back, so that a recipe which counts on replay can be
    refused."""

    @abstractmethod
    def offer(self, groups: Sequence[Group]) -> None:
        """Take fresh groups; the buffer decides which to keep."""

    @abstractmethod
    def num_ready(self, policy_version: int) -> int:
        """Count the groups that ``draw`` could give at that version if no question were excluded."""

    @abstractmethod
    def draw(
        self, count: int, policy_version: int, excluded: frozenset[str], rng: np.random.Generator
    ) -> Sequence[Group]:
        """Draw at most ``count`` groups of distinct questions, bit-equal to what was offered.

        Args:
            count: 0 or more; fewer are given when fewer qualify.
            policy_version: the present one; a group's staleness is the difference to its own.
            excluded: questions that are trained fresh in the same step; never drawn.
            rng: the only source of chance.
        """


class RolloutConfig(PluginConfig):
    """How completions are sampled, whatever samples them."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, when sampling and in all log-probs."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens whose probability reaches this; 1 is off, and what keeps importance ratios
    exact."""
    top_k: int = Field(default=0, ge=0)
    """Only the k likeliest tokens; 0 is off."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Only tokens at least this fraction as likely as the likeliest; 0 is off."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens of an answer at most, the end-of-sequence token included; longer ones are cut and counted."""

    canary_every: int = Field(default=1, ge=0)
    """Takings over of new weights between canaries, which score a few completions by sampler and trainer; 0:
    never."""
    canary_bound_nats: float | None = Field(default=None, gt=0)
    """Mean absolute difference of the canary's log-probs that stops the run; null: by the model's dtype."""

    def sampling(self) -> Sampling:
        """Collect the sampling options."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.max_completion_length)

    def memory(
        self, sizes: ModelSizes, arithmetic: BatchArithmetic, num_processes: int, device_bytes: int | None
    ) -> SamplingMemory | None:
        """Say what sampling takes on the device of one process, or None where nobody can know.

        Args:
            sizes: the model's.
            arithmetic: how many completions, and how long.
            num_processes: the questions are split over them.
            device_bytes: memory of the device, if that is known.
        """
        return None


class Rollout(Component):
    """How are completions sampled?"""

    kind = "rollout"
    config: RolloutConfig
    shares_module: ClassVar[bool] = False
    """True where the module in training itself samples: its log-probs are then the trainer's up to rounding,
    and its weights are never stale."""

    @abstractmethod
    def start(self, policy: Policy) -> None:
        """See the policy before the first generation."""

    def sync(self, policy: Policy) -> None:
        """Take over the policy's new weights after an update; nothing to do where the module is shared."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Sequence[Sequence[Completion]]:
        """Sample ``num_generations`` completions of each prompt, in the prompts' order.

        Log-probs are those of the distribution sampled from: at ``sampling.temperature``, renormalised if
        ``sampling.is_truncated``.

        Args:
            prompts: the questions as tokens.
            num_generations: completions of each.
            sampling: temperature, truncation and greatest length.
            seeds: one a prompt, in [0, 2**63): all that its completions depend on beside the prompt and the
                weights, so that other prompts around it, or another number of processes, change nothing.
        """


class ObjectiveConfig(PluginConfig):
    """Options that every objective has."""

    num_iterations: int = Field(default=1, ge=1)
    """Passes over a step's batch (mu of GRPO)."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass; each minibatch holds fresh and replayed groups in the batch's proportion."""

    def needs_reference_model(self) -> bool:
        """Whether ``Objective.loss`` will read ``reference_logprobs``."""
        return False

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse more minibatches than groups: some would be empty."""
        if self.num_minibatches > arithmetic.questions_per_step:
            yield (
                "num_minibatches",
                f"{self.num_minibatches} minibatches need at least as many groups, but "
                f"training.questions_per_step is {arithmetic.questions_per_step}",
            )


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Completion tokens of a micro-batch, laid end to end; every tensor is [tokens]."""

    logprobs: torch.Tensor
    """Nats, of the policy being optimised, at the sampling temperature; carries the gradient."""
    proximal_logprobs: torch.Tensor
    """Nats, of the policy at the start of the step."""
    behaviour_logprobs: torch.Tensor
    """Nats, of the policy that sampled the token."""
    reference_logprobs: torch.Tensor | None
    """Nats, of the frozen reference model; None unless the objective ``needs_reference_model``."""
    advantages: torch.Tensor
    """Of the token's rollout."""
    rollout_index: torch.Tensor
    """Which rollout of the micro-batch the token is part of: 0, 0, 0, 1, 1, ... (int64)."""
    is_replayed: torch.Tensor
    """Whether the token's rollout came from the replay buffer (bool)."""
    num_rollouts: int
    """Rollouts of the whole minibatch, those of equal-reward groups included: a denominator."""
    num_tokens: int
    """Completion tokens of the whole minibatch, those of equal-reward groups included: a denominator."""
    max_completion_length: int


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """What an objective makes of a micro-batch."""

    loss: torch.Tensor
    """Scalar; the sum over a minibatch's micro-batches is the minibatch's loss."""
    sums: Mapping[str, torch.Tensor]
    """Figures as sums over tokens, scalars without gradient: the engine divides by the tokens that ran
    (``update/NAME``)."""


class Objective(Component):
    """What is to be made small?"""

    kind = "objective"
    config: ObjectiveConfig

    @property
    def needs_reference_model(self) -> bool:
        """Whether ``loss`` reads ``reference_logprobs``; the first policy is kept only then."""
        return self.config.needs_reference_model()

    @property
    def equal_rewards_carry_gradient(self) -> bool:
        """Whether a group of equal rewards has a gradient all the same (a KL term); else it is not run."""
        return self.needs_reference_model

    @abstractmethod
    def advantages(self, rewards: Float[np.ndarray, "group"]) -> Float[np.ndarray, "group"]:
        """Turn the rewards of one group into advantages, in the same order; all 0 for equal rewards."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Compute a micro-batch's share of the minibatch's loss, whatever the split into micro-batches."""


class TrackerConfig(PluginConfig):
    """Options that every tracker has."""


class Tracker(Component):
    """Who is told?

    Implements any of the watching hooks (``dteframe.hookspecs``) as methods with ``@hookimpl``.
    """

    kind = "tracker"
    config: TrackerConfig


KINDS: Mapping[str, type[Component]] = {
    contract.kind: contract
    for contract in (Model, Dataset, Reward, Estimator, Selector, Replay, Rollout, Objective, Tracker)
}
"""The kinds in the order of the recipe's keys."""
