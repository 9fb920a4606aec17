"""The policy in the forms in which vLLM takes it: a folder of configuration, its sizes, files of weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dteframe import Context, Policy

if TYPE_CHECKING:
    import torch

    from dteframe.rollouts.vllm import VLLMRolloutConfig

SHARED_MEMORY = Path("/dev/shm")
BYTES_PER_FILE = 2**30
"""Weights are written and read in parts of about this size, so that they are never there twice as a whole."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
"""Entries of a model's configuration that trainer and sampler must share."""


def write_configuration(policy: Policy, folder: Path) -> None:
    """Write configuration and tokenizer, without weights, as ``save_pretrained`` does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(policy.module.config)
    # Not the module's class: adapters and shards change its name.
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def policy_sizes(policy: Policy) -> dict[str, int | bool]:
    """Give what the sampler's model must have in common with the policy."""
    config = policy.module.config
    return {name: getattr(config, name) for name in SIZES if getattr(config, name, None) is not None}


class ParameterFiles:
    """Hands weights to other processes in files that are removed once they have been read."""

    def __init__(self, config: VLLMRolloutConfig, context: Context) -> None:
        """Choose the folder: the recipe's, or memory that the machine's processes share, or the run's."""
        fallback = SHARED_MEMORY if SHARED_MEMORY.is_dir() else context.run_folder
        self._folder = Path(config.weights_folder).expanduser() if config.weights_folder else fallback
        self._folder.mkdir(parents=True, exist_ok=True)

    def written(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Path]:
        """Write some weights, give the file, and remove it when the next is asked for."""
        path = self._folder.resolve() / f"dteframe_weights_{os.getpid()}.safetensors"
        for part in in_parts(weights, BYTES_PER_FILE):
            yield from _written(path, part)


def in_parts(
    weights: Iterator[tuple[str, torch.Tensor]], num_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Gather weights, in their order, until they have that many bytes; a larger one stands alone."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > num_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _written(path: Path, part: dict[str, torch.Tensor]) -> Iterator[Path]:
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in part.items()}, path)
        yield path
    finally:
        path.unlink(missing_ok=True)
