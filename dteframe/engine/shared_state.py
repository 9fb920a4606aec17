"""What all processes hold together, on disk: the policy's weights and the learner's state.

The learner's state is in the safetensors files of torch.distributed.checkpoint, one a process, each with its
shards; any number of processes reads them. Numbers that are the same everywhere are in ``learner.json``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from dteframe.assemble import Parts
from dteframe.contracts import Component
from dteframe.engine import calls
from dteframe.engine.distributed import Processes
from dteframe.engine.lora import adapter_weights, load_adapter, write_adapter
from dteframe.engine.member import Member, Sync, Work
from dteframe.engine.state_files import read_state, write_state
from dteframe.errors import ResumeError
from dteframe.records import State

LEARNER = "learner"
"""Name of the JSON file and of the folder with the shards."""
SEPARATOR = "/"
"""Between the keys of a shard's name; parameters' names hold dots, never this."""


@dataclass(frozen=True, slots=True)
class SavePolicy(Work[None]):
    """Write ``policy``, which plain transformers loads, and ``adapter``, which peft does, if there is one."""

    folder: Path

    def do(self, member: Member) -> None:
        """Give this process's shards; the main process writes."""
        _save_trained(member, self.folder)
        if member.policy.lora_base_sha256 is not None:
            _save_module(member, self.folder / "policy")
        member.tell_warnings()  # It is the last work: what was warned of since the last answers is told here.


@dataclass(frozen=True, slots=True)
class Save(Work[None]):
    """Write what all processes hold together: the weights, and the learner's state in everybody's shards."""

    folder: Path

    def do(self, member: Member) -> None:
        """Give this process's shards, and write its file of the learner's state."""
        _save_trained(member, self.folder)
        write_learner(self.folder, member.learner.state_dict(), member.processes)


@dataclass(frozen=True, slots=True)
class Load(Work[None]):
    """Put back what all processes hold: the weights, the learner's state, and that of shared components."""

    folder: Path
    states: Mapping[str, State]
    """Of the components, by name."""

    def do(self, member: Member) -> None:
        """Take this process's part."""
        if member.policy.lora_base_sha256 is None:
            _load_weights(member, self.folder / "policy")
        else:
            load_adapter(member.policy, self.folder / "adapter")
        learner_state = read_learner(self.folder, dict(member.policy.module.named_parameters()))
        member.learner.load_state_dict(learner_state)
        components = shared_components(member.parts)
        for name, state in self.states.items():
            take_back(components[name], state)
        Sync().do(member)


def _save_trained(member: Member, folder: Path) -> None:
    """Write what training changes: the adapter alone with LoRA, else weights, configuration and tokenizer."""
    policy = member.policy
    if policy.lora_base_sha256 is None:
        _save_module(member, folder / "policy")
        return
    weights = _on_main(adapter_weights(policy), member.processes)
    if member.processes.is_main:
        write_adapter(policy, weights, folder / "adapter")


def _save_module(member: Member, folder: Path) -> None:
    """Write the whole policy, an adapter merged, in the recipe's type."""
    policy, processes = member.policy, member.processes
    if not processes.are_sharded and policy.lora_base_sha256 is None:
        policy.module.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        return
    weights = _on_main(policy.weights(), processes)
    if processes.is_main:
        dtype = getattr(torch, member.recipe.model.dtype)  # Shards may be the weights' float32 masters.
        for name, weight in weights.items():
            weights[name] = weight.to(dtype) if weight.is_floating_point() else weight
        policy.module.save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)


def _on_main(weights: Iterator[tuple[str, torch.Tensor]], processes: Processes) -> dict[str, torch.Tensor]:
    """Keep whole weights in the main process's memory; the others only help to put them together."""
    kept = {}
    for name, weight in weights:
        if processes.is_main:
            kept[name] = weight.cpu()
    return kept


def shared_components(parts: Parts) -> Mapping[str, Component]:
    """Name the components that every process uses."""
    named: dict[str, Component] = {"rollout": parts.rollout, "objective": parts.objective}
    return named | {f"reward.{place}": reward for place, reward in enumerate(parts.rewards)}


def take_back(component: Component, state: State) -> None:
    """Give a component the state that it had at a checkpoint.

    Raises:
        ResumeError: it cannot take it; its code is another than the one that wrote it.
    """
    try:
        with calls.running(component):
            component.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{calls.label(component)}: does not take back its state ({type(error).__name__}: {error}); "
            "resume with the code that wrote the checkpoint, or give another name=... to start afresh"
        ) from error


def write_learner(folder: Path, state: Mapping[str, Any], processes: Processes) -> None:
    """Write the learner's state: every process its own shards, the main one what is not sharded."""
    shards: dict[str, torch.Tensor] = {}
    rest = _without_shards(state, "", shards)
    if shards:
        writer = HuggingFaceStorageWriter(str(folder / LEARNER), save_distributed=True)
        with _alone():
            save(shards, storage_writer=writer, no_dist=not processes.are_sharded)
    if processes.is_main:
        write_state(folder, LEARNER, rest)


def read_learner(folder: Path, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Read what ``write_learner`` wrote, sharded as ``parameters`` are.

    Args:
        folder: the checkpoint.
        parameters: the module's, by name; the state of others is left None.
    """
    rest = read_state(folder, LEARNER)
    reader = HuggingFaceStorageReader(str(folder / LEARNER))
    shards = {}
    if (folder / LEARNER).is_dir():
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            parameter = next((parameters[key] for key in name.split(SEPARATOR) if key in parameters), None)
            if parameter is not None and isinstance(saved, TensorStorageMetadata):
                shards[name] = torch.empty_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
        with _alone():
            load(shards, storage_reader=reader, no_dist=True)
    state = _with_shards(rest, "", shards)
    assert isinstance(state, dict)
    return state


def _without_shards(value: object, path: str, shards: dict[str, torch.Tensor]) -> Any:
    """Take the tensors out of a tree, under their paths; numbers in tensors stay."""
    if isinstance(value, torch.Tensor) and value.ndim > 0:
        shards[path] = value
        return None
    if isinstance(value, Mapping):
        return {key: _without_shards(item, _joined(path, key), shards) for key, item in value.items()}
    return value


def _with_shards(value: object, path: str, shards: Mapping[str, torch.Tensor]) -> Any:
    """Put the tensors back."""
    if isinstance(value, Mapping):
        return {key: _with_shards(item, _joined(path, key), shards) for key, item in value.items()}
    return shards.get(path, value) if value is None else value


@contextmanager
def _alone() -> Iterator[None]:
    """Keep torch from warning that a process alone is alone, and give the first of its errors as it was."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:  # It is no Exception: it would pass those who word errors.
        first, _ = next(iter(error.failures.values()))
        raise first from error


def _joined(path: str, key: str) -> str:
    return f"{path}{SEPARATOR}{key}" if path else key


def _load_weights(member: Member, folder: Path) -> None:
    """Read a whole policy in the main process, and hand everybody their shards."""
    module, processes = member.policy.module, member.processes
    whole: dict[str, Any] = {}
    if processes.is_main:
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=module.dtype, local_files_only=True, use_safetensors=True
        )
        whole = saved.state_dict()
    if not processes.are_sharded:
        module.load_state_dict(whole)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, whole, options=options)
