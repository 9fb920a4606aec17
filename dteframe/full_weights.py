"""The whole weights of a module, whatever it is split into: shards of several processes, a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
"""What peft calls the adapter of a module that has one."""


def full_weights(module: torch.nn.Module, *, of_adapter: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every parameter once, under the name that transformers saves it with, one whole tensor at a time.

    Under several processes all must iterate together: putting shards together is a common work.

    Args:
        module: one that transformers made, or a part of it.
        of_adapter: give the adapter's parameters under the module's own names; without, they are merged into
            the weights below.
    """
    for name, parameter in module.named_parameters():
        if f".{ADAPTER}." in name:
            if of_adapter:
                yield name, _whole(parameter)
        elif not of_adapter:
            owner, is_adapted, own = name.rpartition(".base_layer.")
            if is_adapted and own == "weight":
                yield f"{owner}.{own}", _merged(parameter, module.get_submodule(owner))
            else:
                yield f"{owner}.{own}" if is_adapted else name, _whole(parameter)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    found = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def _merged(parameter: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """Add what the adapter of peft's layer adds, in float32; rounded to the weight's own type at the end."""
    import torch

    with torch.no_grad():
        added = _whole(cast("torch.Tensor", layer.get_delta_weight(ADAPTER)))  # type: ignore[operator]  # peft's
        weight = _whole(parameter)
        return (weight.float() + added.float()).to(weight.dtype)
