"""A small policy made on the spot: random weights, a tokenizer of characters, and a supervised warm-up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field

from dteframe import BatchArithmetic, Component, Model, ModelConfig, ModelSizes, Policy, Question, hookimpl
from dteframe.memory import DTYPE_BYTES, decoder_parameters
from dteframe.models.architectures import Architecture, Sizes, default_intermediate_size, untrained_module
from dteframe.models.attention_ways import AttentionImplementation, attention_problems, check_attention
from dteframe.models.cached_weights import CorruptCacheError, read_weights, write_weights
from dteframe.models.characters import CHAT_CHARACTERS, PRINTABLE, SPECIAL_TOKENS, character_tokenizer
from dteframe.models.warm_up import WarmUpConfig, WorkedExample, warm_up, worked_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FromScratchConfig(ModelConfig):
    """Options of the model that is made from scratch; sizes are called as transformers calls them."""

    type: Literal["from_scratch"] = "from_scratch"
    architecture: Architecture = "qwen2"
    """Which of transformers' model classes."""
    hidden_size: int = Field(default=64, ge=2)
    """Width; a multiple of twice ``num_heads``."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the feed-forward networks; None for 2.75 times ``hidden_size``, rounded to a multiple of 8."""
    num_layers: int = Field(default=2, ge=1)
    """Blocks of attention and feed-forward network."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values, a divisor of ``num_heads``; None for as many as ``num_heads``."""
    max_position_embeddings: int = Field(default=1024, ge=2)
    """Tokens that the model reads at most, prompt and completion together."""
    tie_word_embeddings: bool = True
    """Whether input and output share one embedding matrix."""
    initializer_range: float = Field(default=0.05, gt=0)
    """Standard deviation of the first weights. Large models take 0.02, with which a width of 64 hardly learns
    in the few hundred steps of a warm-up (docs/experiments.md)."""
    attn_implementation: AttentionImplementation = "sdpa"
    """How attention is computed once the warm-up, which takes sdpa, is over; those called flash need a GPU,
    bfloat16 and the package of that name."""
    characters: Literal["printable", "questions"] = "printable"
    """What the model can read and write: printable ASCII and whatever else the training questions hold, or
    only what their prompts, answers, worked solutions and the chat template's own text hold: hot sampling of
    characters that no answer has ends late."""
    seed: int | None = Field(default=None, ge=0)
    """Of the first weights and the warm-up's order; None for the recipe's seed."""
    warm_up: WarmUpConfig = WarmUpConfig()
    """Supervised steps on the training questions' worked solutions."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Give the smallest model that is still warmed up."""
        return cls(hidden_size=16, num_layers=1, num_heads=2, warm_up=WarmUpConfig(steps=2, batch_size=4))

    def architecture_sizes(self) -> Sizes:
        """Fill in the sizes that are left open."""
        return Sizes(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or default_intermediate_size(self.hidden_size),
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            initializer_range=self.initializer_range,
        )

    def sizes(self) -> ModelSizes | None:
        """Give the sizes with a vocabulary of printable ASCII; what the questions change of it is small."""
        made = self.architecture_sizes()
        vocabulary_size = len(SPECIAL_TOKENS) + len(PRINTABLE)
        sizes = ModelSizes(
            num_parameters=0,
            parameter_bytes=DTYPE_BYTES[self.dtype],
            num_layers=made.num_layers,
            hidden_size=made.hidden_size,
            intermediate_size=made.intermediate_size,
            num_heads=made.num_heads,
            num_key_value_heads=made.num_key_value_heads,
            head_size=made.hidden_size // made.num_heads,
            vocabulary_size=vocabulary_size,
            ties_embeddings=made.tie_word_embeddings,
            assumption=f"a vocabulary of {vocabulary_size} characters; the questions may "
            + ("bring more" if self.characters == "printable" else "hold fewer"),
            shares_prompts=self.attn_implementation == "sdpa",
        )
        counted = decoder_parameters(sizes, has_attention_bias=self.architecture == "qwen2")
        return replace(sizes, num_parameters=counted)

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Check the sizes against one another and against the run's lengths."""
        yield from self.size_problems()
        yield from attention_problems(self.attn_implementation, self.dtype)
        longest = arithmetic.max_prompt_length + arithmetic.max_completion_length
        if longest > self.max_position_embeddings:
            yield (
                "max_position_embeddings",
                f"{self.max_position_embeddings} is less than training.max_prompt_length "
                f"{arithmetic.max_prompt_length} + rollout.max_completion_length "
                f"{arithmetic.max_completion_length}; give at least {longest}",
            )

    def size_problems(self) -> Iterator[tuple[str, str]]:
        """Yield what keeps the sizes from making a model: (own key, what)."""
        if self.hidden_size % (2 * self.num_heads):
            yield (
                "hidden_size",
                f"{self.hidden_size} is not a multiple of twice num_heads {self.num_heads}: a head needs an "
                "even width",
            )
        if self.num_key_value_heads is not None and self.num_heads % self.num_key_value_heads:
            yield (
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_heads {self.num_heads}",
            )


@final
class FromScratch(Model):
    """Make a small Qwen2 or Llama, with a tokenizer of the pool's characters, and warm it up.

    The warmed-up weights are cached: they depend on the options, the seed, the texts, the kind of device and
    the versions of torch and transformers, and are made again when any of these changes.
    """

    config: FromScratchConfig

    def load(self, questions: Sequence[Question]) -> Policy:
        """Build the policy; train it on the worked solutions if ``warm_up.steps`` is not 0.

        Raises:
            ValueError: sizes that do not fit one another, or nothing to warm up on.
        """
        problems = [f"{key} {what}" for key, what in self.config.size_problems()]
        if problems:
            raise ValueError(f"model 'from_scratch': {'; '.join(problems)}")
        check_attention(self.config.attn_implementation, self.context.device)
        seed = self.context.seed if self.config.seed is None else self.config.seed
        always_known = PRINTABLE if self.config.characters == "printable" else ""
        tokenizer = character_tokenizer(_texts(questions), always_known)
        tokenizer.model_max_length = self.config.max_position_embeddings
        module = untrained_module(self.config.architecture, self.config.architecture_sizes(), tokenizer, seed)
        module.to(self.context.device)  # type: ignore[arg-type]  # transformers annotates to() as a decorator
        if self.config.warm_up.steps:
            self._warm_up(module, tokenizer, worked_examples(questions, tokenizer, self.context.warn), seed)
        if self.config.dtype == "bfloat16":
            module.bfloat16()
        module.set_attn_implementation(self.config.attn_implementation)
        return Policy(module, tokenizer, self.context.device)

    def _warm_up(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[WorkedExample],
        seed: int,
    ) -> None:
        """Take the warmed-up weights from the cache, or make them and put them there."""
        steps = self.config.warm_up.steps
        path = (
            self.context.cache_folder / "from_scratch" / f"{self._key(tokenizer, examples, seed)}.safetensors"
        )
        if path.exists():
            try:
                facts = read_weights(path, module)
            except CorruptCacheError as problem:
                self.context.warn(f"{path}: cached weights are left unused: {problem}; warming up again")
            else:
                what = (
                    f"warmed up on {len(examples)} questions to {facts['final_loss']} nats a token (cached)"
                )
                self.context.progress(what, steps, steps)
                return
        computes_in = self._warm_up_computes_in()
        loss = warm_up(module, examples, self.config.warm_up, seed, self.context.progress, computes_in)
        write_weights(path, module, {"final_loss": f"{loss:.4f}"})
        what = f"warmed up on {len(examples)} questions to {loss:.4f} nats a token"
        self.context.progress(what, steps, steps)

    def _warm_up_computes_in(self) -> Literal["float32", "bfloat16"]:
        """Take the policy's own type on a GPU; a CPU would not be faster for it."""
        return "float32" if self.context.device == "cpu" else self.config.dtype

    def _key(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[WorkedExample], seed: int) -> str:
        """Hash everything that the warmed-up weights depend on."""
        options = self.config.model_dump(
            mode="json", exclude={"type", "dtype", "seed", "lora", "attn_implementation"}
        )
        surroundings = {
            "seed": seed,
            "vocabulary": tokenizer.get_vocab(),
            "device": self.context.device.split(":")[0],
            "computes_in": self._warm_up_computes_in(),
            "versions": [version("torch"), version("transformers")],
        }
        digest = hashlib.sha256(json.dumps([options, surroundings], sort_keys=True).encode())
        for example in examples:
            digest.update(f"{example.num_prompt_tokens} {len(example.token_ids)} ".encode())
            digest.update(example.token_ids.tobytes())
        return digest.hexdigest()[:32]


def _texts(questions: Sequence[Question]) -> Iterator[str]:
    """Give every text that the policy may read or should be able to write."""
    for question in questions:
        if isinstance(question.prompt, str):
            yield question.prompt
        else:
            yield from (text for message in question.prompt for text in message.values())
            yield CHAT_CHARACTERS
        yield question.answer
        yield question.solution or ""


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this file."""
    return [FromScratch]
