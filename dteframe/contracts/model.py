"""Models: which policy do we train?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dteframe.contracts.component import Component, PluginConfig
from dteframe.full_weights import full_weights
from dteframe.records import ModelSizes, Question

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
