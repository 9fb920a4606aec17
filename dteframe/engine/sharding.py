"""FSDP2: a module that is spread over the processes, and what the other processes are told of it.

The main process alone loads the model. The others build one of the same shape without weights, all shard it,
and the weights go from the main process to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dteframe.contracts import Policy
from dteframe.engine.distributed import Processes
from dteframe.engine.logprobs import CompletionScorer, scorer_inputs
from dteframe.engine.micro_batches import MicroBatch
from dteframe.errors import DataError
from dteframe.full_weights import ADAPTER

if TYPE_CHECKING:
    from peft import PeftConfig

REMOTE_CODE = "transformers_modules."
"""Where transformers puts classes that it loads with ``trust_remote_code``."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """All of a policy but its weights: what a process needs to build a module of the same shape."""

    module_class: type[PreTrainedModel]
    config: Any
    generation_config: Any
    dtypes: Mapping[str, torch.dtype]
    """Of the parameters, by name."""
    trainable: frozenset[str]
    """Names of the parameters that are not frozen."""
    tokenizer: PreTrainedTokenizerBase
    adapter: PeftConfig | None
    lora_base_sha256: str | None

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Describe a policy that transformers made.

        Raises:
            DataError: the module's code came with the model, and the other processes do not have it.
        """
        module = policy.module
        if type(module).__module__.startswith(REMOTE_CODE):
            raise DataError(
                f"model: {type(module).__name__} is code that came with the model (model.trust_remote_code), "
                "which several processes cannot share; run it in one, or use a model that transformers has"
            )
        parameters = dict(module.named_parameters())
        return cls(
            module_class=type(module),
            config=module.config,
            generation_config=module.generation_config,
            dtypes={name: parameter.dtype for name, parameter in parameters.items()},
            trainable=frozenset(name for name, item in parameters.items() if item.requires_grad),
            tokenizer=policy.tokenizer,
            adapter=cast("PeftConfig", module.peft_config[ADAPTER]) if policy.lora_base_sha256 else None,
            lora_base_sha256=policy.lora_base_sha256,
        )

    def build(self, device: str) -> Policy:
        """Make a policy whose tensors have shapes and types and no memory."""
        with torch.device("meta"):
            module = self.module_class(self.config)
            if self.adapter is not None:
                from peft import inject_adapter_in_model

                inject_adapter_in_model(self.adapter, module, ADAPTER)
        module.generation_config = self.generation_config
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.requires_grad_(name in self.trainable)
        return Policy(module.train(False), self.tokenizer, device, self.lora_base_sha256)


@dataclass(frozen=True, slots=True)
class Precision:
    """In what type a sharded module is kept and computed with."""

    compute: torch.dtype | None = None
    """What the gathered parameters are cast to; None for their own type."""
    offloads: bool = False
    """Whether shards, gradients and optimizer wait in the main memory."""


def first_scorer(policy: Policy, temperature: float, processes: Processes) -> CompletionScorer:
    """Make a policy's scorer; what only a module with weights tells is asked of the main process's."""
    found = CompletionScorer(policy.module, temperature).has_plain_head if processes.is_main else None
    return CompletionScorer(policy.module, temperature, has_plain_head=processes.broadcast(found))


def shard(
    scorer: CompletionScorer,
    precision: Precision,
    processes: Processes,
    device: str,
    source: CompletionScorer | None = None,
) -> None:
    """Spread a scorer's module over the processes, layer by layer, and fill it.

    Gradients are added up over the processes, not averaged: the losses carry the denominators of the whole
    minibatch. The scorer is the root: embeddings and head are gathered while its ``forward`` runs.

    Args:
        scorer: with weights, or without memory (``Skeleton.build``).
        precision: types, and whether shards are offloaded.
        processes: all of them call this.
        device: where each computes.
        source: whose weights it gets: a sharded scorer of the same shape; None for the main process's own.
    """
    whole, buffers = {}, {}
    if source is None:
        if processes.is_main:  # Held until it has been handed out; on a GPU it would stand beside the shards.
            whole = {name: value.cpu() for name, value in scorer.state_dict().items()}
        buffers = processes.broadcast(_buffers(scorer) if processes.is_main else {})
    else:
        buffers = _buffers(source)
    _spread(scorer, precision, processes, device)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(scorer.get_submodule(owner), leaf, buffer.to(device))
    if source is None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(scorer, whole, options=options)
    else:
        theirs = dict(source.named_parameters())
        with torch.no_grad():
            for name, parameter in scorer.named_parameters():
                parameter.copy_(theirs[name])
    # The first forward pass finds the root; sampling begins with a layer, which would be taken for it.
    with torch.no_grad():
        scorer(*scorer_inputs(MicroBatch(()), 0, device))
    release(scorer)


def release(scorer: CompletionScorer) -> None:
    """Give back what a forward pass without a backward one leaves gathered: the root's own parameters."""
    if isinstance(scorer, FSDPModule):
        scorer.reshard()


@contextmanager
def gathered(scorer: CompletionScorer) -> Iterator[None]:
    """Have the whole module in every process for a while, so that each can run it without the others."""
    modules = _sharded(scorer)
    root = modules[0] if modules else None
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not root, recurse=False)


def _spread(scorer: CompletionScorer, precision: Precision, processes: Processes, device: str) -> None:
    """Replace the parameters by shards; those without memory get some."""
    is_empty = next(scorer.parameters()).is_meta
    is_on_gpu = torch.device(device).type != "cpu"  # Memory is pinned for an accelerator; a CPU has none.
    options: dict[str, Any] = {
        "mesh": init_device_mesh(torch.device(device).type, (processes.count,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=is_on_gpu) if precision.offloads else OffloadPolicy(),
    }
    units = set(getattr(scorer.module, "_no_split_modules", None) or ())
    for layer in [item for item in scorer.modules() if type(item).__name__ in units]:
        fully_shard(layer, **options)
    fully_shard(scorer, **options)
    for module in _sharded(scorer):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # Gloo has no sum that also scales.
    if is_empty:
        scorer.to_empty(device="cpu" if precision.offloads else device)


def _buffers(scorer: CompletionScorer) -> dict[str, torch.Tensor]:
    """Copy the buffers, those that are never saved too: a module without memory cannot make them."""
    return {name: buffer.cpu() for name, buffer in scorer.named_buffers()}


def _sharded(scorer: CompletionScorer) -> list[FSDPModule]:
    return [module for module in scorer.modules() if isinstance(module, FSDPModule)]
