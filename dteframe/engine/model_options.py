"""What the engine does to every policy once it is loaded: LoRA, gradient checkpointing."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from transformers import PreTrainedModel

from dteframe.contracts import ModelConfig, Policy
from dteframe.engine.lora import add_lora
from dteframe.errors import DataError
from dteframe.recipe import TrainingConfig


def apply_model_options(
    policy: Policy, model: ModelConfig, training: TrainingConfig, rng: np.random.Generator
) -> None:
    """Do to a loaded policy, in place, what the recipe says of every model.

    Args:
        policy: as ``Model.load`` gave it.
        model: the recipe's section; ``lora`` is read.
        training: the recipe's section; ``gradient_checkpointing`` is read.
        rng: of the adapter's first weights.

    Raises:
        DataError: the model cannot have what is asked for, or a package is missing.
    """
    if model.lora is not None:
        add_lora(policy, model.lora, rng)
    if training.gradient_checkpointing:
        checkpoint_gradients(policy.module)


def num_trainable(module: torch.nn.Module) -> int:
    """Count the numbers that training changes: the adapter's with LoRA."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def checkpoint_gradients(module: PreTrainedModel) -> None:
    """Let layers be computed again in the backward pass; transformers does so in training mode only."""
    if not module.supports_gradient_checkpointing:
        raise DataError(
            f"training.gradient_checkpointing: {type(module).__name__!r} cannot do it; leave the key out, "
            "and lower training.micro_batch_tokens for less memory"
        )
    with warnings.catch_warnings():
        # Newer versions of transformers have another name for it; this one works in all that we allow.
        warnings.simplefilter("ignore", FutureWarning)
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]  # it is
    # It also hooks into the embeddings, which the reentrant way alone needs, and which slows sampling down.
    module.disable_input_require_grads()  # type: ignore[no-untyped-call]  # as above
