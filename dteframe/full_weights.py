"""The whole weights of a module, whatever it is split into: shards of several processes put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def full_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every parameter once, under the name that transformers saves it with, one whole tensor at a time.

    Under several processes all must iterate together: putting shards together is a common work.
    """
    from torch.distributed.tensor import DTensor

    for name, parameter in module.named_parameters():
        whole = parameter.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole
