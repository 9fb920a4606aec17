"""How much of a text an embedding model reads: what was asked for, and what its own files say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dteframe import Context


def readable_length(module: Any, tokenizer: Any, max_length: int) -> int:
    """Give the tokens of a text that a transformers model can be given: beyond these it breaks.

    Models of RoBERTa's kind number positions from behind their padding token's, so that some of the table
    is never used.
    """
    positions = getattr(module.config, "max_position_embeddings", None) or max_length
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            positions -= part.padding_idx + 1
    return int(min(max_length, positions, tokenizer.model_max_length))


def warn_of_long_texts(lengths: Sequence[int], limit: int, folder: Path, context: Context) -> None:
    """Count the texts that are cut, and those that are longer than a sentence model was made for."""
    num_cut = sum(length > limit for length in lengths)
    if num_cut:
        context.warn(
            f"embeddings: {num_cut} of {len(lengths)} texts are longer than {limit} tokens and are cut; "
            "embeddings.max_length sets the limit, up to what the model takes"
        )
    intended = intended_length(folder)
    num_beyond = 0 if intended is None else sum(length > intended for length in lengths)
    if intended is not None and intended < limit and num_beyond:
        context.warn(
            f"embeddings: {num_beyond} of {len(lengths)} texts are longer than the {intended} tokens that "
            f"{folder.name} was made for, and are read on up to {limit}; embeddings.max_length: {intended} "
            "cuts them there"
        )


def intended_length(folder: Path) -> int | None:
    """Read the length that a sentence model's own files cut texts at, if they name one."""
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return None
    length = json.loads(path.read_text()).get("max_seq_length")
    return length if isinstance(length, int) else None
