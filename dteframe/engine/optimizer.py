"""The optimizer: AdamW on the trainable parameters, through float32 copies where they are coarser.

Parameters may be DTensors: it is built after the module is sharded, and every process then calls the same
methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from dteframe.errors import ResumeError

if TYPE_CHECKING:
    from dteframe.recipe import TrainingConfig

DEFAULT_MIN_LR_RATE = 0.1
"""What ``cosine_with_min_lr`` falls to; recipes of open-r1 have it."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What the learner needs of the recipe's ``training``; the names are the same."""

    max_steps: int
    learning_rate: float
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"]
    warmup_steps: int
    learning_rate_scaling: Literal["none", "unequal_groups"]
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    micro_batch_tokens: int
    min_lr_rate: float | None
    optim: Literal["adamw_torch", "adamw_torch_fused"]
    float32_master_weights: bool
    cpu_offload: bool

    @classmethod
    def from_training(cls, training: TrainingConfig) -> Self:
        """Take the fields of equal names."""
        return cls(**{item.name: getattr(training, item.name) for item in fields(cls)})


def learning_rate_at(step: int, settings: OptimizerSettings) -> float:
    """Give the learning rate of a training step, counted from 0; all its optimizer steps have the same.

    It rises over ``warmup_steps`` without ever being 0, then stays, or falls, to 0 or to ``min_lr_rate`` of
    itself, just after the last step. The fall is that of transformers; transformers' rise begins at 0 and
    wastes a step.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    if settings.lr_scheduler_type == "linear":
        return settings.learning_rate * max(0.0, 1 - done)
    if settings.lr_scheduler_type in ("cosine", "cosine_with_min_lr"):
        lowest = _lowest_rate(settings)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return settings.learning_rate * (lowest + (1 - lowest) * share)
    return settings.learning_rate


def _lowest_rate(settings: OptimizerSettings) -> float:
    if settings.lr_scheduler_type == "cosine":
        return 0.0
    return DEFAULT_MIN_LR_RATE if settings.min_lr_rate is None else settings.min_lr_rate


class Optimizer:
    """Takes the optimizer steps of a module: gather gradients, clip, step.

    AdamW, as transformers sets it up for TRL: no weight decay on vectors (biases, norms). Parameters that are
    not float32 are trained through a float32 copy, because a bfloat16 weight is too coarse for steps of 1e-6;
    without ``float32_master_weights`` they are trained as they are, which is pure bfloat16.
    """

    def __init__(self, module: torch.nn.Module, settings: OptimizerSettings) -> None:
        """Take the module's trainable parameters, at least one."""
        self._settings = settings
        self._trained = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        master_of = _float32_copy if settings.float32_master_weights else _itself
        self._masters = {name: master_of(parameter) for name, parameter in self._trained.items()}
        self._is_fused = settings.optim == "adamw_torch_fused"
        self._adamw = _adamw(self._masters.values(), settings)
        self._learning_rate = settings.learning_rate

    def start_step(self, step: int) -> float:
        """Set the learning rate of a training step, counted from 0, and give it."""
        self._learning_rate = learning_rate_at(step, self._settings)
        return self._learning_rate

    def gather_gradients(self) -> None:
        """Add what a backward pass left on the parameters; call it after each, so that float32 adds up."""
        for name, parameter in self._trained.items():
            _add_gradient(self._masters[name], parameter)

    def clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to ``max_grad_norm`` if their norm is larger; give the norm before.

        The norm is that of the whole gradient, equal in every process, where parameters are sharded.
        """
        norm = clip_grad_norm_(list(self._masters.values()), self._settings.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, unequal_share: float) -> float:
        """Move the parameters along the gathered gradients, and drop these; give the learning rate taken.

        Args:
            unequal_share: share of the groups behind the gradient whose rewards differ, 0 to 1.

        Source: the square root rule for batch sizes under Adam, arXiv:2205.10287, 5. We take the groups that
            carry a gradient for the batch, and leave the betas and epsilon as they are.
        """
        learning_rate = self._learning_rate
        if self._settings.learning_rate_scaling == "unequal_groups":
            learning_rate *= math.sqrt(unequal_share)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.drop_gradients()
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
        return learning_rate

    def drop_gradients(self) -> None:
        """Forget the gathered gradients: their step is not taken."""
        self._adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Give what continues bit for bit: tensors by parameter name.

        They are the live ones (sharded where the parameters are): write or copy them before the next step.
        """
        states = {name: self._adamw.state.get(master, {}) for name, master in self._masters.items()}
        return {
            "adamw": {name: dict(values) for name, values in states.items()},
            "masters": {
                name: master.detach()
                for name, master in self._masters.items()
                if master is not self._trained[name]
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; the parameters themselves are loaded beside it.

        Raises:
            ResumeError: the state belongs to another model.
        """
        check_names("the optimizer", self._trained, state["adamw"])
        for name, master in self._masters.items():
            values = state["adamw"][name]
            # Unless fused, Adam keeps its step count on the CPU; everything else is beside the parameter.
            self._adamw.state[master] = {
                key: value.to("cpu" if key == "step" and not self._is_fused else master.device, copy=True)
                for key, value in values.items()
            }
        with torch.no_grad():
            for name, saved in state["masters"].items():
                self._masters[name].copy_(saved)


def check_names(what: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare the names of parameters with those on a checkpoint.

    Raises:
        ResumeError: they differ; says in what.
    """
    if set(ours) == set(saved):
        return
    examples = sorted(set(ours) ^ set(saved))[:3]
    raise ResumeError(
        f"learner: {what} has {len(ours)} parameters and the checkpoint {len(saved)} of them; they differ in "
        f"{examples!r}; resume with the recipe of the run"
    )


def _itself(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return parameter


def _float32_copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Give the parameter itself if it is float32, else a float32 copy that the optimizer works on."""
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def _add_gradient(master: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
    """Move the parameter's gradient to its float32 copy."""
    if master is parameter or parameter.grad is None:
        return
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def _adamw(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    every = list(parameters)
    groups = [
        {"params": [item for item in every if item.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [item for item in every if item.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        # None lets torch choose between its plain ways by the device.
        fused=True if settings.optim == "adamw_torch_fused" else None,
    )
