"""The sizes of a model as it was loaded: what its configuration said and no less."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from dteframe.models.stored_sizes import sizes_of_config
from dteframe.records import ModelSizes


def loaded_sizes(module: PreTrainedModel) -> ModelSizes | None:
    """Give the sizes of a module before it is sharded, or None if it is no plain decoder.

    Where some parameters are frozen, those that are not count as an adapter.
    """
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    config = module.config.get_text_config()
    sizes = sizes_of_config(
        config.to_dict(),
        num_parameters=num_parameters,
        parameter_bytes=module.dtype.itemsize,
        ties_embeddings=bool(config.tie_word_embeddings),
    )
    if sizes is None or num_trained == num_parameters:
        return sizes
    return replace(sizes, num_parameters=num_parameters - num_trained, num_adapter_parameters=num_trained)
