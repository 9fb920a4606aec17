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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dteframe import Context, DataError, PolicyEncoder
from dteframe.estimators.embedding_models import (
    TextEncoder,
    check_sentence_model,
    find_model_folder,
    hash_model,
    load_encoder,
)
from dteframe.estimators.embedding_options import (
    EmbeddingsConfig,
    JoinedEmbeddings,
    NgramEmbeddings,
    PolicyEmbeddings,
    SentenceEmbeddings,
)
from dteframe.estimators.ngrams import ngram_embeddings
from dteframe.estimators.scratch import scratch_matrix

ROWS_PER_FILE = 1024
"""Texts per cache file: what an interrupted run loses at most."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """Something that embeds texts, loaded only when it has to."""

    id: str
    """Equal ids give equal embeddings: the type and the hash of everything that they depend on; of the policy
    what is taken of it."""
    load: Callable[[Sequence[str]], TextEncoder]
    """Loads it; is given all texts that will be embedded, to warn once of those that are too long."""
    batch_size: int | None
    """Texts per call. None for the policy, which makes its own batches and reports its own progress."""
    is_cached: bool = True
    """False for the policy, whose weights have no name, and for what is as quickly computed as read."""
    parts: tuple[Embedder, ...] = ()
    """Those that stand side by side; then there is nothing to load."""


def embedder_of(config: EmbeddingsConfig, encode_with_policy: PolicyEncoder, context: Context) -> Embedder:
    """Find the embedder that a recipe asks for; reads a model's files to name them, but does not load it.

    Raises:
        DataError: the folder, package or hub model cannot be found, or is not a model that this can read.
    """
    if isinstance(config, PolicyEmbeddings):
        options = config.model_dump(exclude={"type"}, exclude_none=True)
        name = ":".join(["policy", *(f"{option}={value}" for option, value in options.items())])
        return Embedder(name, lambda _: partial(encode_with_policy, **options), None, is_cached=False)
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
    options = config.model_dump(exclude={"path", "revision", "batch_size"}, exclude_none=True)
    digest = hash_model(folder, options)
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


def _nothing_to_load(texts: Sequence[str]) -> TextEncoder:
    raise AssertionError("joined embeddings are made of their parts")
