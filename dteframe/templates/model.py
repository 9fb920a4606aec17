"""A model from a folder that transformers saved, with its end token for padding where it has none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, final

from dteframe import Model, ModelConfig, Policy, Question, hookimpl


class MyPluginConfig(ModelConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    path: str
    """The folder, with a model and a tokenizer in it."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Save a tiny model: what ``dteframe check`` loads."""
        from dteframe.testing.tiny import tiny_policy

        policy = tiny_policy()
        policy.module.save_pretrained(folder / "tiny")
        policy.tokenizer.save_pretrained(folder / "tiny")
        return cls(path=str(folder / "tiny"))


@final
class MyPlugin(Model):
    """A causal language model from a local folder."""

    config: MyPluginConfig

    def load(self, questions: Sequence[Question]) -> Policy:
        """Load the model in the wanted type and put it on the device."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = getattr(torch, self.config.dtype)
        tokenizer = AutoTokenizer.from_pretrained(self.config.path, local_files_only=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        module = AutoModelForCausalLM.from_pretrained(self.config.path, dtype=dtype, local_files_only=True)
        module.to(self.context.device)  # type: ignore[arg-type]  # transformers' wrapper hides the types
        module.train(False)
        return Policy(module, tokenizer, self.context.device)


@hookimpl
def dteframe_components() -> list[type[Model]]:
    """Add ``model.type=my_plugin``."""
    return [MyPlugin]
