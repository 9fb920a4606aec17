"""A model's sizes from its files: the configuration and tables of contents, never the weights themselves."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dteframe.errors import DataError
from dteframe.records import ModelSizes

SAFETENSORS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, GGUF_HEAD, GGUF_EMBEDDINGS = "lm_head.weight", "output.weight", "token_embd.weight"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of models whose tokens go through some of the parameters only: the arithmetic is not theirs."""
PLAIN_DECODERS = frozenset({"llama", "qwen2", "qwen3"})
"""Model types whose attention sees all that stands before, and whose positions are what they are told."""


def sizes_in_folder(folder: Path, parameter_bytes: int) -> ModelSizes | None:
    """Read the sizes of what ``save_pretrained`` wrote, or None if it is no plain decoder.

    Raises:
        DataError: a file is broken; names it.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG).is_file() or not files:
        return None
    return _sizes(_json(folder / CONFIG), files, parameter_bytes)


def sizes_in_hub_cache(hub_id: str, revision: str | None, parameter_bytes: int) -> ModelSizes | None:
    """Read the sizes of a model that was downloaded before, or None; nothing is fetched."""
    config, index = _cached(hub_id, CONFIG, revision), _cached(hub_id, INDEX, revision)
    if config is None:
        return None
    names = {SAFETENSORS}
    if index is not None:
        names = set(_json(index)["weight_map"].values())
    files = [_cached(hub_id, name, revision) for name in sorted(names)]
    present = [file for file in files if file is not None]
    if len(present) < len(files):
        return None
    return _sizes(_json(config), present, parameter_bytes)


def gguf_in_hub_cache(hub_id: str, file_name: str, revision: str | None) -> Path | None:
    """Find a GGUF file that was downloaded before."""
    return _cached(hub_id, file_name, revision)


def sizes_in_gguf(file: Path, parameter_bytes: int) -> ModelSizes | None:
    """Read the sizes of a GGUF file's model as it is once unpacked, or None where the package is missing."""
    if importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader

    reader = GGUFReader(file)
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    found = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.") and len(field.types) == 1
    }
    config = {
        "hidden_size": found.get(f"{architecture}.embedding_length"),
        "intermediate_size": found.get(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": found.get(f"{architecture}.block_count"),
        "num_attention_heads": found.get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": found.get(f"{architecture}.attention.head_count_kv"),
        "head_dim": found.get(f"{architecture}.attention.key_length"),
        "num_experts": found.get(f"{architecture}.expert_count"),
        "vocab_size": shapes.get(GGUF_EMBEDDINGS, [0])[-1],
    }
    return sizes_of_config(
        {key: value for key, value in config.items() if value},
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        parameter_bytes=parameter_bytes,
        ties_embeddings=GGUF_HEAD not in shapes,
    )


def sizes_of_config(
    config: Mapping[str, Any], *, num_parameters: int, parameter_bytes: int, ties_embeddings: bool
) -> ModelSizes | None:
    """Take the sizes from a configuration of transformers, or None if it is not that of a plain decoder."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(not isinstance(config.get(key), int) for key in needed) or any(config.get(key) for key in EXPERTS):
        return None
    num_heads: int = config["num_attention_heads"]
    return ModelSizes(
        num_parameters=num_parameters,
        parameter_bytes=parameter_bytes,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=num_heads,
        num_key_value_heads=config.get("num_key_value_heads") or num_heads,
        head_size=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocabulary_size=config["vocab_size"],
        ties_embeddings=ties_embeddings,
        shares_prompts=sees_all_before(config),
    )


def sees_all_before(config: Mapping[str, Any]) -> bool:
    """Whether attention sees all that it is told to: it can then keep rows apart that are laid end to end."""
    has_window = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    layers = config.get("layer_types") or ()
    return (
        config.get("model_type") in PLAIN_DECODERS
        and not has_window
        and all(layer == "full_attention" for layer in layers)
    )


def _sizes(config: Mapping[str, Any], files: Iterable[Path], parameter_bytes: int) -> ModelSizes | None:
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes.update(_shapes_in(file))
    if config.get("tie_word_embeddings"):
        shapes.pop(HEAD, None)  # Some files hold the shared matrix twice.
    return sizes_of_config(
        config,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        parameter_bytes=parameter_bytes,
        ties_embeddings=HEAD not in shapes,
    )


def _shapes_in(file: Path) -> dict[str, list[int]]:
    """Read a safetensors file's header: eight bytes of its length, then JSON.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        entries = json.loads(header)
        return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file}: its header cannot be read ({error}); fetch or save the model again"
        ) from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error}); fetch or save the model again") from error


def _cached(hub_id: str, file_name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, file_name, revision=revision)
    return Path(found) if isinstance(found, str) else None
