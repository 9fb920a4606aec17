"""What a recipe says: the training section, one configuration per kind, and the JSON schema for editors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.json_schema import models_json_schema

from dteframe.contracts import (
    KINDS,
    DatasetConfig,
    EstimatorConfig,
    ModelConfig,
    ObjectiveConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    SelectorConfig,
    TrackerConfig,
)
from dteframe.recipe.document import SCALARS
from dteframe.recipe.health_config import HealthConfig
from dteframe.records import BatchArithmetic
from dteframe.registry import Registry

LIST_KINDS = ("reward", "tracker")
"""Kinds of which a recipe may name several."""
DEFAULT_SECTIONS: Mapping[str, dict[str, Any] | list[dict[str, Any]]] = {
    "estimator": {"type": "none"},
    "selector": {"type": "uniform"},
    "replay": {"type": "none"},
    "rollout": {"type": "transformers"},
    "objective": {"type": "grpo"},
    "tracker": [{"type": "console"}, {"type": "jsonl"}, {"type": "tensorboard"}],
}
"""What a recipe means where it leaves a section out; ``jsonl`` is added to every list of trackers."""
DEFAULT_SEED = 0
REQUIRED = ("name", "training", "model", "dataset", "reward")
"""Keys that every recipe has."""
TOP_LEVEL = ("name", "seed", "training", *KINDS)
"""All keys of a recipe, in the order in which they are written."""
SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""A run's name is its folder's."""


class HeadConfig(BaseModel):
    """The keys of a recipe that are no section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    name: str
    """Name of the run, and of its folder; letters, digits, ``.``, ``_`` and ``-``, at most 100."""
    seed: int = Field(default=DEFAULT_SEED, ge=0, le=2**32 - 1)
    """Every draw of the run follows from it."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(SAFE_NAME, name):
            raise ValueError(
                f"{name!r} cannot be a folder's name everywhere; use letters, digits, '.', '_' and '-', "
                "at most 100, beginning with a letter or digit"
            )
        return name


class TrainingConfig(BaseModel):
    """How long and how fast, whatever the plugins; TRL's names where TRL has one."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    max_steps: int = Field(ge=1)
    """Training steps (T of the DOTS paper); each takes one or more optimizer steps."""
    questions_per_step: int = Field(ge=1)
    """Groups that a step learns from, fresh and replayed (B)."""
    num_generations: int = Field(default=8, ge=2)
    """Completions per question: the size of a group (G)."""
    learning_rate: float = Field(default=1e-6, gt=0, le=100)
    """AdamW's, after the warm-up."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "constant"
    """The learning rate after the warm-up; ``linear`` and ``cosine`` reach 0 just after the last step,
    ``cosine_with_min_lr`` reaches ``min_lr_rate`` of it."""
    min_lr_rate: float | None = Field(default=None, ge=0, lt=1)
    """Share of the learning rate that ``cosine_with_min_lr`` falls to; null: 0.1."""
    warmup_steps: int = Field(default=0, ge=0)
    """Training steps in which the learning rate rises linearly; the first has more than 0."""
    learning_rate_scaling: Literal["none", "unequal_groups"] = "none"
    """``unequal_groups``: an optimizer step's learning rate is multiplied by the root of the share of its
    groups whose rewards differ. AdamW's steps are as long where few groups carry a gradient, and noisier."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch"
    """AdamW in plain or in fused operations: the same steps up to rounding, the second faster on a GPU."""
    float32_master_weights: bool = True
    """Take optimizer steps on float32 copies of bfloat16 parameters, 4 bytes more per parameter and twice the
    optimizer's memory; without, a step smaller than about 1/256 of a weight is lost."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, about a
    third more time for an update, the same gradients."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer in main memory while they are not in use, sharded over the
    processes: for GPUs that are too small; needs ``--processes``, 1 at least."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What follows where a loss, gradient or log-prob is not finite: the run stops, or goes on without that
    minibatch, or group; either way what it was made of is kept in the run folder."""
    max_steps_with_skips: int = Field(default=3, ge=1)
    """Training steps in a row with something skipped after which the run stops all the same."""
    selection_interval: int = Field(default=2, ge=1)
    """Steps that one plan serves: questions are selected once for all of them (mu)."""
    fresh_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of a step's groups that is newly generated, the rest is replayed (delta); null: 0.5 with a replay
    buffer, else 1."""
    reuse_references: bool = True
    """Train on informative reference groups as on fresh ones, instead of generating that many more."""
    success_threshold: float = 0.99
    """A completion is a success if the first reward scores it at least this high."""
    reward_workers: int | None = Field(default=None, ge=0)
    """Processes in which the rewards of each process of the run are scored, while it samples; null: one for
    every two cores, 4 at most. 0: in the run's own process, where nothing bounds their time or memory: for a
    reward that needs the GPU."""
    reward_timeout_seconds: float = Field(default=10.0, gt=0)
    """Time to score the completions of a question; where that is too short each is scored alone, in as much
    time, and the worker that took longer is replaced."""
    reward_memory_bytes: int = Field(default=2**32, ge=2**28)
    """Memory that a worker may ask for (its address space); more is refused to it, which an error follows."""
    on_reward_failure: Literal["zero", "leave_out", "stop"] = "zero"
    """Completions that a reward fails on or takes too long for count as 0; or their groups are neither
    trained on nor observed (in references and evaluations they count as 0); or the run stops at the first."""
    max_reward_failure_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of failures among the completions that are asked at once above which the run stops."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; questions with a longer prompt are counted and left out, never cut."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens, padding included, that go through the model at once, a shared prompt once; changes memory and
    speed alone."""
    evaluate_every: int = Field(default=10, ge=0)
    """Steps between evaluations, which also stand at the start and the end; 0: never."""
    evaluation_size: int = Field(default=64, ge=0)
    """Questions asked at an evaluation; held out of the training questions where the dataset has no split of
    its own."""
    num_generations_eval: int = Field(default=4, ge=1)
    """Completions per question at an evaluation."""
    evaluation_temperature: float | None = Field(default=None, gt=0)
    """Sampling temperature at evaluations; null: the rollout's."""
    checkpoint_every: int = Field(default=20, ge=0)
    """Steps between checkpoints; 0: only at the end and when the run is stopped."""
    save_total_limit: int | None = Field(default=3, ge=1)
    """Checkpoints that are kept, the newest; the one with the best evaluation is kept besides, and named in
    ``checkpoints/best.json``. null: all."""
    health: HealthConfig = HealthConfig()
    """From where on the run's own figures are warned of."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy is trained; ``auto``: a GPU if there is one."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A valid recipe: every default filled in."""

    name: str
    seed: int
    training: TrainingConfig
    model: ModelConfig
    dataset: DatasetConfig
    reward: list[RewardConfig]
    estimator: EstimatorConfig
    selector: SelectorConfig
    replay: ReplayConfig
    rollout: RolloutConfig
    objective: ObjectiveConfig
    tracker: list[TrackerConfig]
    replays: bool
    """Whether the replay buffer ever gives a group back: a fact of the plugin, not a key of the recipe."""

    def arithmetic(self) -> BatchArithmetic:
        """Count what a step and a plan are made of."""
        return batch_arithmetic(self.training, self.estimator, self.selector, self.rollout, self.replays)

    def to_yaml(self) -> str:
        """Write the recipe out with all defaults; it loads back to an equal one."""
        written: dict[str, Any] = {}
        for key in TOP_LEVEL:
            value = getattr(self, key)
            if isinstance(value, list):
                written[key] = [item.model_dump(mode="json") for item in value]
            else:
                written[key] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        return yaml.dump(
            written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False
        )


class _Dumper(yaml.SafeDumper):
    """Quote text that YAML 1.1 or YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape line breaks that only YAML knows: PyYAML would write them raw and read back a space."""
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _tag, _pattern in SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern.pattern), None)


def batch_arithmetic(
    training: TrainingConfig,
    estimator: EstimatorConfig,
    selector: SelectorConfig,
    rollout: RolloutConfig,
    replays: bool,
) -> BatchArithmetic:
    """Count what a step and a plan are made of.

    Source: DOTS (arXiv:2506.05316), 4.3: (1 - delta) B groups are replayed; we use the integer part.
    """
    fresh_fraction = training.fresh_fraction or (0.5 if replays else 1.0)
    # 1 - 0.9 is a little less than 0.1 in floats; without the margin 10 questions would give no replay.
    num_replayed = math.floor((1 - fresh_fraction) * training.questions_per_step + 1e-9)
    return BatchArithmetic(
        max_steps=training.max_steps,
        questions_per_step=training.questions_per_step,
        num_generations=training.num_generations,
        selection_interval=training.selection_interval,
        num_replayed=num_replayed if replays else 0,
        reference_size=estimator.num_references(),
        max_prompt_length=training.max_prompt_length,
        max_completion_length=rollout.max_completion_length,
        questions_per_group=selector.questions_per_group(),
    )


def json_schema(registry: Registry) -> dict[str, Any]:
    """Give the JSON schema of recipes, the registry's plugins included, for editors."""
    configs = [item.config for kind in KINDS for item in registry.of_kind(kind)]
    models: list[type[BaseModel]] = [TrainingConfig, *configs]
    references, definitions = models_json_schema([(model, "validation") for model in models])
    schema_of = {model: references[model, "validation"] for model in models}
    # A plugin's `type` has a default in Python; a recipe must name it.
    for kind in KINDS:
        for item in registry.of_kind(kind):
            _require_type(definitions, schema_of[item.config])
    properties: dict[str, Any] = HeadConfig.model_json_schema()["properties"]
    properties["name"]["pattern"] = f"^{SAFE_NAME}$"
    properties["training"] = schema_of[TrainingConfig]
    for kind, contract in KINDS.items():
        one = _one_of(registry, kind, schema_of)
        several = {"oneOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        properties[kind] = {
            "description": (contract.__doc__ or "").splitlines()[0],
            **(several if kind in LIST_KINDS else one),
        }
        if kind in DEFAULT_SECTIONS:
            properties[kind]["default"] = DEFAULT_SECTIONS[kind]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DTEFrame recipe",
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": properties,
        "$defs": definitions["$defs"],
    }


def _one_of(registry: Registry, kind: str, schema_of: Mapping[type[BaseModel], Any]) -> dict[str, Any]:
    plugins = registry.of_kind(kind)
    names = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": [item.name for item in plugins]}},
    }
    chosen = [
        {"if": {"properties": {"type": {"const": item.name}}}, "then": schema_of[item.config]}
        for item in plugins
    ]
    return {**names, "allOf": chosen}


def _require_type(definitions: dict[str, Any], reference: Mapping[str, Any]) -> None:
    definition = definitions["$defs"][reference["$ref"].rpartition("/")[2]]
    definition["required"] = ["type", *definition.get("required", [])]
