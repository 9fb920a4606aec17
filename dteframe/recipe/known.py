"""What an unknown word may have meant: a key of another section, another tool's name, a misspelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dteframe.contracts import KINDS
from dteframe.recipe.document import KeyPath
from dteframe.recipe.messages import nearest
from dteframe.recipe.schema import TOP_LEVEL, TrainingConfig
from dteframe.registry import Registry

FOREIGN_NAMES = {
    "B": "training.questions_per_step",
    "C": "replay.capacity",
    "G": "training.num_generations",
    "K": "estimator.reference_size",
    "T": "training.max_steps",
    "alpha": "selector.target_success_rate",
    "batch_size": "training.questions_per_step",
    "bf16": "model.dtype",
    "buffer_size": "replay.capacity",
    "clip_eps": "objective.epsilon",
    "clip_range": "objective.epsilon",
    "clip_ratio": "objective.epsilon",
    "cliprange": "objective.epsilon",
    "delta": "training.fresh_fraction",
    "enable_gradient_checkpointing": "training.gradient_checkpointing",
    "eval_steps": "training.evaluate_every",
    "generation_batch_size": "training.questions_per_step",
    "grad_clip": "training.max_grad_norm",
    "group_size": "training.num_generations",
    "kl_coef": "objective.beta",
    "kl_loss_coef": "objective.beta",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "max_new_tokens": "rollout.max_completion_length",
    "max_response_length": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "mini_batch_size": "objective.num_minibatches",
    "min_lr_ratio": "training.min_lr_rate",
    "mu": "training.selection_interval",
    "n": "training.num_generations",
    "num_samples": "training.num_generations",
    "num_train_steps": "training.max_steps",
    "per_device_train_batch_size": "training.questions_per_step",
    "optimizer": "training.optim",
    "ppo_epochs": "objective.num_iterations",
    "rank": "model.lora.r",
    "rollout_n": "training.num_generations",
    "save_freq": "training.checkpoint_every",
    "save_steps": "training.checkpoint_every",
    "steps": "training.max_steps",
    "tau": "selector.temperature",
    "test_freq": "training.evaluate_every",
    "torch_dtype": "model.dtype",
    "total_steps": "training.max_steps",
    "train_batch_size": "training.questions_per_step",
    "use_peft": "model.lora",
    "warmup": "training.warmup_steps",
}
"""What other tools (TRL, verl, OpenRLHF) and the DOTS paper call our keys."""


class Unknown:
    """Word what is wrong with an unknown word, knowing all plugins."""

    def __init__(self, registry: Registry) -> None:
        """Look words up in that registry."""
        self.registry = registry

    def top_level(self, key: str) -> str:
        """Word an unknown key at the top of the recipe."""
        return self._words(key, TOP_LEVEL, list(self._elsewhere((key,))))

    def option(self, path: KeyPath, known: Sequence[str]) -> str:
        """Word an unknown key inside a section, whose keys are ``known``."""
        return self._words(str(path[-1]), known, list(self._elsewhere(path)))

    def plugin(self, kind: str, name: str) -> str:
        """Word an unknown plugin."""
        others = [other for other in KINDS if name in self.registry.names(other)]
        if others:
            known = ", ".join(self.registry.names(kind))
            advice = f"{name!r} is a plugin of {' and '.join(others)} (known: {known})"
        else:
            advice = self.registry.advice(kind, name)
        return f"there is no {kind} {name!r}; {advice}"

    def meant(self, path: KeyPath, known: Sequence[str]) -> str | None:
        """Give the key of the same section that an unknown key most likely stands for."""
        key, section = str(path[-1]), str(path[0]) if len(path) > 1 else ""
        same = _but_for_underscores(key, known)
        if same is not None or list(self._elsewhere(path)):
            return same
        for name in known:
            if FOREIGN_NAMES.get(key) == f"{section}.{name}" or nearest(key, known).endswith(f" {name!r}?"):
                return name
        return None

    def _words(self, key: str, known: Sequence[str], elsewhere: Sequence[str]) -> str:
        same = _but_for_underscores(key, known)
        if same is not None:
            return f"unknown key; did you mean {same!r}?"
        if elsewhere:
            return f"unknown key; it is a key of {' and of '.join(elsewhere)}"
        if key in FOREIGN_NAMES:
            return f"unknown key; here it is called {FOREIGN_NAMES[key]}"
        near = nearest(key, known)
        if near:
            return f"unknown key; {near}"
        return f"unknown key; known: {', '.join(known)}" if known else "unknown key; none is known here"

    def _elsewhere(self, path: KeyPath) -> Iterator[str]:
        """Name the sections that have a key of exactly this name; plugins of the same kind before others."""
        key, kind = str(path[-1]), str(path[0])
        if len(path) > 1 and kind in KINDS:
            same = [item.name for item in self.registry.of_kind(kind) if key in item.config.model_fields]
            if same:
                yield f"{kind} {' and '.join(repr(name) for name in same)}"
                return
        if len(path) > 1 and key in TOP_LEVEL:
            yield "the recipe's top level"
        if key in TrainingConfig.model_fields and kind != "training":
            yield "training"
        for other in KINDS:
            names = [item.name for item in self.registry.of_kind(other) if key in item.config.model_fields]
            if names and other != kind and key != "type":
                all_of_them = len(names) == len(self.registry.names(other))
                yield other if all_of_them else f"{other} {' and '.join(repr(name) for name in names)}"


def _but_for_underscores(key: str, known: Sequence[str]) -> str | None:
    """Find the known key that differs in its underscores alone: ``warmup`` is ``warm_up``."""
    return next((name for name in known if name.replace("_", "") == key.replace("_", "")), None)
