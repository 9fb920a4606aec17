"""LoRA: a low-rank adapter on the policy's linear layers, made, switched off, written and read.

The layers are peft's; they stand inside the module that transformers made, so that whatever reads or samples
with the module needs to know nothing of them. ``Policy.weights`` merges them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from dteframe.contracts import LoraOptions, Policy
from dteframe.errors import DataError, ResumeError
from dteframe.full_weights import ADAPTER, full_weights

WEIGHTS, BASE_SHA256 = "adapter_model.safetensors", "base_sha256"
PREFIX = "base_model.model."
"""What peft writes before the names of a model's parameters."""


def add_lora(policy: Policy, options: LoraOptions, rng: np.random.Generator) -> None:
    """Put an adapter on the policy's linear layers that changes nothing yet, and freeze everything else.

    The adapter's parameters are float32, whatever the type of those below.

    Args:
        policy: gets the adapter in place, and the hash of its own weights.
        options: the recipe's ``model.lora``.
        rng: of the adapter's first weights; torch's own generator is left as it was.

    Raises:
        DataError: a target module is no linear layer of the model.

    Source: LoRA, arXiv:2106.09685; with ``use_rslora`` rsLoRA, arXiv:2312.03732. The layers are peft's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module = policy.module
    _check_targets(policy, options)
    policy.lora_base_sha256 = _sha256_of_weights(module)
    config = LoraConfig(
        **options.model_dump(), task_type="CAUSAL_LM", base_model_name_or_path=module.name_or_path or None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        inject_adapter_in_model(config, module, ADAPTER)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    module.train(False)


@contextmanager
def without_adapter(module: torch.nn.Module) -> Iterator[None]:
    """Let the module be what it was before the adapter, dropout off: the reference model of a LoRA run."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    was_training = module.training
    module.train(False)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        module.train(was_training)


def adapter_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the adapter's parameters under the module's names, whole and one at a time.

    Under several processes all must iterate together.
    """
    return full_weights(policy.module, of_adapter=True)


def write_adapter(policy: Policy, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter in peft's format: ``PeftModel.from_pretrained(base, folder)`` reads it.

    Args:
        policy: whose adapter it is.
        weights: what ``adapter_weights`` gives.
        folder: made if it does not exist; the hash of the weights below the adapter is in it too.
    """
    assert policy.lora_base_sha256 is not None
    folder.mkdir(parents=True, exist_ok=True)
    policy.module.peft_config[ADAPTER].save_pretrained(folder)
    named = {_name_of_peft(name): weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, {"format": "pt", BASE_SHA256: policy.lora_base_sha256})


def read_adapter(policy: Policy, folder: Path) -> dict[str, torch.Tensor]:
    """Read what ``write_adapter`` wrote: whole tensors on the CPU under the module's names.

    Raises:
        ResumeError: the adapter was trained on other weights, or has other layers.
    """
    ours = {_name_of_peft(name): name for name, _ in policy.module.named_parameters() if _is_adapter(name)}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        base = (file.metadata() or {}).get(BASE_SHA256)
        if base != policy.lora_base_sha256:
            raise ResumeError(
                f"{folder}: the adapter was trained on other weights than those that the model has now "
                f"(sha256 {base!r} there, {policy.lora_base_sha256!r} now); bring the former model back "
                "(a hub's model is pinned by model.revision), or give another name=... to start afresh"
            )
        names = set(file.keys())
        if names != set(ours):
            raise ResumeError(
                f"{folder}: the adapter has {len(names)} matrices and the model's {len(ours)}; they differ "
                f"in {sorted(names ^ set(ours))[:3]!r}; resume with the recipe of the run"
            )
        return {ours[name]: file.get_tensor(name) for name in sorted(names)}


def load_adapter(policy: Policy, folder: Path) -> None:
    """Put an adapter back that ``write_adapter`` wrote, bit for bit."""
    parameters = dict(policy.module.named_parameters())
    with torch.no_grad():
        for name, weight in read_adapter(policy, folder).items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):  # Every process reads the file, and takes its shard.
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = weight.to(parameter.device)
                weight = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            parameter.copy_(weight)


def _is_adapter(name: str) -> bool:
    return f".{ADAPTER}." in name


def _name_of_peft(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".")


def _check_targets(policy: Policy, options: LoraOptions) -> None:
    """Refuse names that no linear layer ends with: peft passes over those that it does not find."""
    from transformers.pytorch_utils import Conv1D

    if options.target_modules == "all-linear":
        return
    module = policy.module
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head
    ]
    unknown = [
        target
        for target in options.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unknown:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise DataError(
            f"model.lora.target_modules: {unknown!r} are no linear layers of the model that can have an "
            f"adapter; name some of: {known}"
        )


def _sha256_of_weights(module: torch.nn.Module) -> str:
    """Hash names, types and values of all parameters; 1.5 billion in bfloat16 take about 3 seconds."""
    digest = hashlib.sha256()
    for name, weight in full_weights(module):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
