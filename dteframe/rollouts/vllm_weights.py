"""How a vLLM engine takes over new weights: a backend of vLLM's own weight transfer, run by its workers.

vLLM's workers load it through the entry-point group ``vllm.general_plugins``, in this process and in servers
that run where DTEFrame is installed. It loads weights under the names that transformers saves them with,
layer by layer, so that vLLM fuses, shards and packs them as it does when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "dteframe"
"""What ``--weight-transfer-config '{"backend": "dteframe"}'`` names."""


@dataclass
class PolicyInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vllm is not there when types are checked
    """What the trainer says of its policy before the first update, so that another model is refused."""

    sizes: dict[str, int | bool]
    """Entries of the configuration that both sides must share, such as ``hidden_size``."""


@dataclass
class WeightsInfo(WeightTransferUpdateInfo):  # type: ignore[misc]  # vllm is not there when types are checked
    """Some of the weights: in a file that all workers can read, or as they are where there is one process."""

    path: str | None = None
    """A safetensors file; it may be removed once the update has returned."""
    weights: Sequence[tuple[str, torch.Tensor]] = ()
    """Names and whole tensors; not changed, and not needed any more once the update is finished."""


class PolicyWeights(WeightTransferEngine[PolicyInfo, WeightsInfo]):  # type: ignore[misc]  # as above
    """Takes whole weights in any number of parts; an update that leaves out a weight is refused."""

    init_info_cls = PolicyInfo
    update_info_cls = WeightsInfo

    def init_transfer_engine(self, init_info: PolicyInfo) -> None:
        """Refuse a trainer whose policy, or whose idea of log-probs, is another than this engine's.

        Raises:
            ValueError: names both values.
        """
        config = self.model_config.hf_text_config
        for name, wanted in init_info.sizes.items():
            found = getattr(config, name, None)
            if found != wanted:
                raise ValueError(f"the policy has {name} {wanted!r}, the model served has {found!r}")
        if self.model_config.logprobs_mode != "processed_logprobs":
            raise ValueError(
                f"logprobs_mode is {self.model_config.logprobs_mode!r}; only processed_logprobs are those of "
                "the distribution sampled from"
            )

    def start_weight_update(self) -> None:
        """Make all layers ready to be loaded anew."""
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WeightsInfo) -> None:
        """Load some of the weights."""
        weights = update_info.weights if update_info.path is None else _read(update_info.path)
        self._loaded |= set(self.model.load_weights(iter(weights)) or self._expected)

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place, those with tied weights too.

        Raises:
            ValueError: a weight was left out; the engine then holds old ones.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        _process_tied_layers(self.model)
        missing = sorted(self._expected - self._loaded)
        if missing and self.model_config.quantization is None:
            raise ValueError(f"the update left out {len(missing)} weights, {missing[0]!r} among them")

    def shutdown(self) -> None:
        """Release nothing: nothing is held between updates."""


def register() -> None:
    """Make the backend known to vLLM; the entry point that vLLM calls once in each of its processes."""
    WeightTransferEngineFactory.register_engine(BACKEND, PolicyWeights)


def _read(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # it is no dict
            yield name, file.get_tensor(name)


def _process_tied_layers(model: torch.nn.Module) -> None:
    """Let layers that share a weight with another derive from it again what they compute with.

    Layerwise reloading does so for layers that were loaded. A tied output layer is not: its weight is the
    embedding's, but on a CPU it computes with a packed copy of its own.
    """
    owners: dict[torch.nn.Parameter, list[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    for module in (module for sharing in owners.values() if len(sharing) > 1 for module in sharing):
        quant_method = getattr(module, "quant_method", None)
        if isinstance(quant_method, QuantizeMethodBase):
            quant_method.process_weights_after_loading(module)
